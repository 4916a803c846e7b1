import re

import numpy as np
import pytest

from asga.report.probabilities import Series, read_series, shades, sparkline
from asga.report.run import Run


def _run(command: str, seeds: dict[str, dict[int, list[float]]]) -> Run:
    """Probabilities of the weight of ``conv`` by seed and epoch."""
    probabilities = {
        seed: {
            epoch: {"conv": {"weight_bits": [2, 4], "weight_probs": values, "act_bits": [8], "act_probs": [1.0]}}
            for epoch, values in epochs.items()
        }
        for seed, epochs in seeds.items()
    }
    return Run({"command": command}, None, None, {}, None, probabilities, [], 0)


class TestReadSeries:
    def test_one_seed_is_shown_as_it_was_logged(self):
        found = read_series(_run("search", {"seed0": {1: [0.5, 0.5], 2: [0.1, 0.9]}}))["conv"]
        assert (found["weight"].candidates, found["weight"].epochs) == ((2, 4), (1, 2))
        assert found["weight"].probabilities.tolist() == [[0.5, 0.5], [0.1, 0.9]]
        assert found["act"].probabilities.tolist() == [[1.0], [1.0]]

    def test_seeds_of_a_search_are_joined_as_its_policy_does(self):
        run = _run("search", {"seed0": {1: [0.5, 0.5], 2: [0.1, 0.9]}, "seed1": {1: [0.8, 0.2]}})
        first, last = read_series(run)["conv"]["weight"].probabilities
        assert first == pytest.approx([2 / 3, 1 / 3])  # sqrt(0.5 * 0.8) : sqrt(0.5 * 0.2)
        assert last == pytest.approx([0.1, 0.9])  # the second seed has not come that far

    def test_what_underflowed_in_one_seed_is_out(self):
        run = _run("search", {"seed0": {1: [0.0, 1.0]}, "seed1": {1: [0.5, 0.5]}})
        assert read_series(run)["conv"]["weight"].probabilities.tolist() == [[0.0, 1.0]]

    def test_other_commands_show_the_last_seed(self):
        run = _run("demo", {"seed0": {1: [0.5, 0.5]}, "seed1": {1: [0.8, 0.2]}})
        assert read_series(run)["conv"]["weight"].probabilities.tolist() == [[0.8, 0.2]]

    def test_nothing_was_searched(self):
        assert read_series(_run("transfer", {})) == {}


class TestSparkline:
    def test_areas_are_the_sums_of_probabilities(self):
        series = Series((2, 4, 8), (1, 2), np.array([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]]))
        drawing = sparkline(series, "conv, weight")
        assert drawing.description == "conv, weight: 2 bits 20% to 10%, 4 bits 30% to 80%, 8 bits 50% to 10%"
        paths = re.findall(r'class="(\w+)" d="([^"]+)"', drawing.svg)
        assert paths == [("shade7", "M0,0H1V100H0Z"), ("shade4", "M0,50L1,10V100H0Z"), ("shade0", "M0,80L1,90V100H0Z")]

    def test_small_floats_are_named(self):
        series = Series((4, "fp4"), (1,), np.array([[0.2, 0.8]]))
        assert sparkline(series, "conv, weight").description == "conv, weight: 4 bits 20% to 20%, fp4 80% to 80%"

    def test_a_single_epoch_is_a_bar(self):
        assert "M0,75L1,75V100H0Z" in sparkline(Series((2, 4), (1,), np.array([[0.25, 0.75]])), "conv").svg

    def test_a_long_search_takes_no_more_room(self):
        shares = np.linspace(0, 1, 1000)
        series = Series((2, 4), tuple(range(1000)), np.stack([shares, 1 - shares], 1))
        line = re.findall(r"M0,100L[^V]+", sparkline(series, "conv").svg)[0]
        assert line.count("L") == 29
        assert line.endswith("L29,0")  # the last epoch is always there


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (1, [0]), (2, [0, 7]), (5, [0, 2, 4, 5, 7]), (8, [*range(8)])]
)
def test_shades_are_as_far_apart_as_can_be(count, expected):
    assert shades(count) == expected
