import re

import numpy as np
import pytest

from asga.search.latency import LatencyTable
from asga.search.profiles import LayerProfile
from asga.search.space import LayerChoices, SpaceChoices

CHOICES = SpaceChoices(
    {"stem": LayerChoices((8,), (8,), pinned=True), "body": LayerChoices((4, "fp8"), (4, 8))},
    {"head": "excluded by the search space"},
    ("stem", "body", "head"),
)
TIMES = {
    ("stem", 8, 8): 70,
    ("body", 4, 4): 20,
    ("body", 4, 8): 30,
    ("body", "fp8", 4): 41,
    ("body", "fp8", 8): 45,
    ("head", None, None): 5,
}
TABLE = LatencyTable(TIMES, {("stem", 8, 8): "int8"})


class TestCsv:
    def test_round_trip(self, tmp_path):
        TABLE.to_csv(tmp_path / "table.csv")
        assert LatencyTable.from_csv(tmp_path / "table.csv") == TABLE
        assert (tmp_path / "table.csv").read_text().splitlines()[:2] == [
            "layer,weight_bits,act_bits,nanoseconds,kernel",
            "stem,8,8,70,int8",
        ]

    @pytest.mark.parametrize(
        ("unit", "text", "nanoseconds"),
        [
            ("seconds", "1.5e-6", 1500),
            ("milliseconds", "0.25", 250_000),
            ("microseconds", "3.1416", 3142),
            ("nanoseconds", "12", 12),
            ("nanoseconds", "0.4", 0),
            ("seconds", "1.5E-6", 1500),
            ("seconds", "1e-999999999", 0),
        ],
    )
    def test_units(self, tmp_path, unit, text, nanoseconds):
        (tmp_path / "table.csv").write_text(
            f"source, layer, {unit}, act_bits, weight_bits\nme, a.0, {text}, float, 4\n"
        )
        assert LatencyTable.from_csv(tmp_path / "table.csv").times == {("a.0", 4, None): nanoseconds}

    def test_names_of_integers(self, tmp_path):
        (tmp_path / "table.csv").write_text("layer,weight_bits,act_bits,seconds\na,int4,8,1\na,fp4,8,2\n")
        assert LatencyTable.from_csv(tmp_path / "table.csv").times == {("a", 4, 8): 10**9, ("a", "fp4", 8): 2 * 10**9}
        table = LatencyTable({("a", "int4", 8): 3}, {("a", "int4", 8): "int8"})
        assert (table.times, table.kernels) == ({("a", 4, 8): 3}, {("a", 4, 8): "int8"})
        with pytest.raises(ValueError, match="layer 'a' with 4 weight bits and 8 activation bits is there twice"):
            LatencyTable({("a", "int4", 8): 3, ("a", 4, 8): 3})

    def test_of_a_spreadsheet(self, tmp_path):
        """With a byte order mark, the line ends of Windows, and a name with a comma."""
        (tmp_path / "table.csv").write_bytes(b'\xef\xbb\xbflayer,weight_bits,act_bits,seconds\r\n"a,b",2,2,1\r\n')
        assert LatencyTable.from_csv(tmp_path / "table.csv").times == {("a,b", 2, 2): 10**9}

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ("", "the columns are none; needed are layer, weight_bits, act_bits and one of seconds"),
            ("layer,weight_bits,seconds\na,2,1", "the columns are layer, weight_bits, seconds; needed are"),
            ("layer,weight_bits,act_bits\na,2,2", "one of seconds, milliseconds"),
            ("layer,weight_bits,act_bits,seconds,nanoseconds\na,2,2,1,1", "and one of seconds"),
            ("layer,weight_bits,act_bits,seconds\n", "the table has no entry"),
            (
                "layer,weight_bits,act_bits,seconds\na,2,2,1\nb,2,2,1\na,2,2,3",
                "line 4: layer 'a' with 2 weight bits and 2 activation bits is there twice",
            ),
            ("layer,weight_bits,act_bits,seconds\na,4,2,1\na,int4,2,1", "line 3: layer 'a' with 4 weight bits and"),
            ("layer,weight_bits,act_bits,seconds\na,2,2,-1", "line 2: seconds is -1; it must not be negative"),
            ("layer,weight_bits,act_bits,seconds\na,2,2,nan", "line 2: seconds is 'nan'; a finite number is needed"),
            (
                "layer,weight_bits,act_bits,seconds\na,2,2,1e999999999",
                "line 2: seconds is '1e999999999'; a finite number",
            ),
            ("layer,weight_bits,act_bits,seconds\na,2,2,inf", "line 2: seconds is 'inf'; a finite number"),
            ("layer,weight_bits,act_bits,seconds\na,2,2", "line 2: seconds is None; a finite number"),
            ("layer,weight_bits,act_bits,seconds\na,2,2,1/0", "line 2: seconds is '1/0'; a finite number"),
            ("layer,weight_bits,act_bits,seconds\na,9,2,1", "line 2: weight_bits is 9; supported are 2 to 8"),
            ("layer,weight_bits,act_bits,seconds\na,2,int,1", "line 2: act_bits is 'int'"),
            ("layer,weight_bits,act_bits,seconds\na,,2,1", "line 2: bits are missing; a number or float"),
        ],
    )
    def test_damaged(self, tmp_path, lines, message):
        (tmp_path / "table.csv").write_text(lines)
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            LatencyTable.from_csv(tmp_path / "table.csv")
        assert "table.csv" in str(error.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no latency table at"):
            LatencyTable.from_csv(tmp_path / "table.csv")


class TestForASpace:
    PROFILES = {name: LayerProfile(name, "Linear", 10, 10, 2, 5) for name in CHOICES.names}  # noqa: RUF012

    def test_complete(self):
        profiles = TABLE.add_to(self.PROFILES, CHOICES)
        assert profiles["body"].times == {(w, a): ns for (name, w, a), ns in TIMES.items() if name == "body"}
        assert profiles["head"].latency_ns == ((None, None, 5),)

    def test_more_than_needed_is_kept_for_words_and_other_layers_are_left_out(self):
        table = LatencyTable({**TIMES, ("body", 2, 2): 9, ("other", 2, 2): 1})
        profiles = table.add_to(self.PROFILES, CHOICES)
        assert profiles.keys() == self.PROFILES.keys()
        assert profiles["body"].times[2, 2] == 9

    def test_missing_entries_are_named(self):
        table = LatencyTable({entry: ns for entry, ns in TIMES.items() if entry[1:] not in ((4, 8), (None, None))})
        with pytest.raises(ValueError, match="the latency table lacks 2 entries of the search space:") as error:
            table.add_to(self.PROFILES, CHOICES)
        assert "\n  layer 'body' with 4 weight bits and 8 activation bits" in str(error.value)
        assert "\n  layer 'head' with float weight bits and float activation bits" in str(error.value)

    def test_of_many_missing_entries_the_first_are_named(self):
        bits = tuple(range(2, 9))
        choices = SpaceChoices({"other": LayerChoices(bits, bits)}, {}, ("other",))
        with pytest.raises(ValueError, match=r"lacks 49 entries(.|\n)*\n  and 39 more"):
            TABLE.check(choices)


class TestTimes:
    @pytest.mark.parametrize("time", [1.0, True, "1"])
    def test_must_be_integers(self, time):
        with pytest.raises(TypeError, match="whole nanoseconds are needed"):
            LatencyTable({("a", 2, 2): time})

    def test_integers_of_numpy_become_those_of_python(self):
        table = LatencyTable({("stem", 8, 8): np.int32(2**31 - 1)})
        assert table == LatencyTable({("stem", 8, 8): 2**31 - 1})
        assert type(table.times["stem", 8, 8]) is int

    def test_must_not_be_negative(self):
        with pytest.raises(ValueError, match="the time of 'a' is -1 ns"):
            LatencyTable({("a", 2, 2): -1})

    def test_bits_must_be_supported(self):
        with pytest.raises(ValueError, match="act_bits is 16"):
            LatencyTable({("a", 2, 16): 1})
