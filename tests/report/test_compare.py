import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from asga.policy import LayerPolicy, Policy
from asga.report import write_comparison


@pytest.fixture
def runs(tmp_path, fill_run) -> Callable[..., list[Path]]:
    """A function that makes run folders with all files, named as asked for."""

    def make(*names: str) -> list[Path]:
        for name in names:
            (tmp_path / name).mkdir(parents=True)
            fill_run(tmp_path / name)
        return [tmp_path / name for name in names]

    return make


@pytest.fixture
def text_of(parse, tmp_path) -> Callable[..., str]:
    """A function that compares run folders and gives the text of the page."""

    def text(*folders: Path) -> str:
        path = write_comparison(folders, tmp_path / "comparison.html")
        assert path == tmp_path / "comparison.html"
        return parse(path).text

    return text


def _without_figures(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()


def _change(folder: Path, name: str, **values: object) -> None:
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))


class TestPage:
    def test_of_two_runs_has_every_section(self, runs, parse, tmp_path):
        path = write_comparison(runs("first", "second"), tmp_path / "comparison.html")
        page = parse(path)
        assert page.headings == ["Options that differ", "Results", "Policies", "Curves"]
        assert "None: all runs have the same options." in page.text
        assert "first searched mixed 94.0 % ± 1.4 % 0.250 ± 0.030 2 1.5 M 75.0 % 1.0 MB 1 min 1 s" in page.text
        for stage in ("float", "search", "searched"):
            assert f"{stage}: first, second." in path.read_text()
        assert len(page.ids) == len(set(page.ids))

    def test_needs_no_network(self, runs, tmp_path):
        page = write_comparison(runs("first", "second"), tmp_path / "comparison.html").read_text()
        outside = set(re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page))
        assert all(address.startswith("#") for address in outside)
        assert "default-src 'none'" in page

    def test_options_that_differ_stand_side_by_side(self, runs, text_of):
        first, second = runs("first", "second")
        for folder in (first, second):
            _without_figures(folder)
        _change(second, "config.json", options={"data": "digits", "seeds": 3, "policy": "p.json"})
        assert "option first second seeds 2 3 policy – p.json Results" in text_of(first, second)

    def test_searches_have_a_table(self, runs, text_of):
        first, second = runs("first", "second")
        for folder in (first, second):
            _without_figures(folder)
        score = {"loss": 1.1, "losses": [1.11, 1.09], "top1": 0.5, "cost_shares": {"bitops": 0.9}}
        uniform = {"policy": score, "pairs": {"w2a4": {**score, "losses": [1.15, 1.15]}}, "tuned": True}
        _change(second, "config.json", command="search")
        agreement = {"equal": 0.5, "chance": 0.4}
        found = {"toss_ups": 3, "choices": 40, "uniform": uniform, "agreement": agreement, "search_seconds": 61}
        _change(second, "result.json", method="sgd", **found)
        row = (
            "second sgd BitOps 75.0 % BitOps 102.0 % 3 of 40 1.1000 (fine-tuned) w2a4: -0.0500 ± 0.0100: better than "
            "uniform bits 50.0 %, chance 40.0 %"
        )
        assert f"{row} 1 min 1 s" in text_of(first, second)

    def test_unfinished_runs_say_so(self, runs, text_of):
        first, second = runs("first", "second")
        (second / "result.json").unlink()
        (second / "policy.json").unlink()
        text = text_of(first, second)
        assert "state – not finished; last epoch: searched/seed1, 1 of 2" in text
        assert "Not compared, since no other run has a policy for the same layers: first." in text

    def test_runs_that_have_nothing_in_common(self, runs, text_of):
        first, second = runs("first", "second")
        (first / "metrics.jsonl").unlink()
        for name in ("config.json", "result.json", "policy.json"):
            (second / name).unlink()
        assert "None: no stage was logged by more than one run." in text_of(first, second)

    def test_everything_from_outside_is_escaped(self, runs, text_of, tmp_path):
        attack = "<script>alert('x')</script>"
        folders = runs("first", "second")
        for folder in folders:
            _without_figures(folder)
            _change(folder, "config.json", command=attack, options={attack: folder.name})
            Policy({attack: LayerPolicy(2, 2)}).save(folder / "policy.json")
        assert text_of(*folders).count(attack) == 4
        assert "<script" not in (tmp_path / "comparison.html").read_text()


class TestPolicies:
    @pytest.fixture
    def folders(self, runs, policy) -> list[Path]:
        """The second run has another weight in the one layer that was searched."""
        folders = runs("first", "second")
        for folder in folders:
            _without_figures(folder)
        changed = {**policy, "layer1.0.conv1": LayerPolicy(3, 4)}
        Policy(changed).save(folders[1] / "policy.json")
        return folders

    def test_stand_side_by_side_with_their_means(self, folders, text_of):
        text = text_of(*folders)
        assert "weight bits activation bits layer first second first second conv1 8 8 8 8" in text
        assert "layer1.0.conv1 2 3 4 4 fc float float 8 8 mean of those quantized 5.00 5.50 6.67 6.67" in text

    def test_what_differs_is_marked(self, folders, tmp_path):
        page = write_comparison(folders, tmp_path / "comparison.html").read_text()
        assert page.count('<td class="number differs">') == 1
        assert '<td class="number differs">3</td>' in page

    def test_all_choices_are_counted_where_no_run_knows_which_were_searched(self, folders, text_of):
        text = text_of(*folders)
        assert "the same bits in 83.3 % of the 6 choices" in text
        assert "no run tells which were searched" in text

    def test_searched_choices_are_counted_where_a_run_knows(self, folders, text_of):
        _change(folders[0], "result.json", logit_gaps={"layer1.0.conv1": {"weight": 0.1, "act": 0.2}})
        text = text_of(*folders)
        assert "the same bits in 50.0 % of the 2 choices" in text
        assert "Counted are the choices that a search made." in text

    def test_of_three_runs_every_pair_is_there(self, folders, text_of, tmp_path):
        shutil.copytree(folders[0], tmp_path / "third")
        text = text_of(*folders, tmp_path / "third")
        assert "All 3 agree on 5 of them." in text
        assert "first, third 100.0 %" in text

    def test_of_other_layers_are_not_compared(self, folders, text_of, tmp_path):
        shutil.copytree(folders[0], tmp_path / "third")
        Policy({"other": LayerPolicy(2, 2)}).save(tmp_path / "third" / "policy.json")
        assert "no other run has a policy for the same layers: third." in text_of(*folders, tmp_path / "third")


class TestNames:
    def test_are_as_long_as_they_must_be(self, runs, text_of):
        folders = runs("a/run", "b/run", "b/other")
        for folder in folders:
            _without_figures(folder)
        assert "3 runs a/run b/run b/other command" in text_of(*folders)


class TestBadInput:
    @pytest.fixture(autouse=True)
    def nothing_is_written(self, tmp_path):
        yield
        assert not (tmp_path / "comparison.html").exists()

    def test_one_run(self, runs, text_of):
        with pytest.raises(ValueError, match="folders has 1 entries; two or more runs"):
            text_of(*runs("first"))

    def test_a_run_twice(self, runs, text_of):
        (first,) = runs("first")
        with pytest.raises(ValueError, match="first is there twice"):
            text_of(first, first.parent / "." / "first")

    def test_a_folder_without_a_run(self, runs, text_of, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere holds no run"):
            text_of(*runs("first"), tmp_path / "nowhere")

    def test_a_damaged_file_is_named(self, runs, text_of):
        first, second = runs("first", "second")
        (second / "result.json").write_text("{")
        with pytest.raises(ValueError, match=r"second/result\.json is not valid JSON"):
            text_of(first, second)
