from dataclasses import replace

import pytest

from asga.search.comparison import Score, UniformComparison


def made(losses: tuple[float, ...]) -> Score:
    return Score(losses, 0.5, {"bitops": 0.9})


def compare(policy: tuple[float, ...], **pairs: tuple[float, ...]) -> UniformComparison:
    return UniformComparison(made(policy), {name: made(losses) for name, losses in pairs.items()})


class TestComparison:
    def test_is_paired(self):
        """Batches differ by far more than policies; their difference does not."""
        comparison = compare((1.0, 5.0, 9.0), w2a4=(1.2, 5.3, 9.2), w4a2=(2.0, 6.0, 10.0))
        assert comparison.best == "w2a4"
        assert comparison.difference == pytest.approx(-0.7 / 3)
        assert comparison.error == pytest.approx(0.1 / 3)  # of (0.2, 0.3, 0.2): deviation 0.0577, by the root of 3
        assert comparison.better is True

    @pytest.mark.parametrize("policy", [(1.2, 5.3, 9.2), (1.1, 5.4, 9.2), (2.0, 6.0, 10.0)])
    def test_not_better(self, policy):
        assert compare(policy, w2a4=(1.2, 5.3, 9.2)).better is False

    @pytest.mark.parametrize(
        ("policy", "verdict"),
        [
            ((1.0, 5.0, 9.0), "better than uniform bits"),
            ((1.1, 5.4, 9.1), "not distinguishable from uniform bits"),  # -0.03 +- 0.07
            ((1.3, 5.2, 9.4), "NOT better than uniform bits"),  # 0.07 +- 0.09: within the error, but not in its favour
            ((2.0, 6.0, 10.0), "NOT better than uniform bits"),
            ((1.2, 5.3, 9.2), "the uniform pair w2a4 itself"),
        ],
    )
    def test_verdict(self, policy, verdict):
        comparison = compare(policy, w2a4=(1.2, 5.3, 9.2), w8a2=(3.0, 6.0, 12.0))
        assert comparison.verdict == comparison.to_dict()["verdict"] == verdict
        assert UniformComparison.from_dict(comparison.to_dict()).verdict == verdict

    def test_one_batch_tells_no_error(self):
        comparison = compare((1.0,), w2a4=(1.2,))
        assert comparison.difference == pytest.approx(-0.2)
        assert (comparison.error, comparison.better) == (None, None)
        assert comparison.verdict == "not comparable with uniform bits on a single batch (smaller ones give more)"
        assert "w2a4, 1.2000: a difference of -0.2000 (" in str(comparison)

    def test_no_pair(self):
        comparison = compare((1.0, 2.0))
        assert (comparison.best, comparison.difference, comparison.error, comparison.better) == (None,) * 4
        assert comparison.verdict == "not comparable with uniform bits"
        assert str(comparison) == "no uniform pair of bits fits the budget"

    def test_in_words(self):
        text = str(compare((1.0, 5.0, 9.0), w2a4=(1.2, 5.3, 9.2)))
        assert "loss on the proxy 5.0000, that of the best uniform pair, w2a4, 5.2333" in text
        assert "-0.2333 ± 0.0333 (standard error over 3 batches); bitops 90.0% against 90.0%" in text

    @pytest.mark.parametrize("tuned", [False, True])
    def test_round_trip(self, tuned):
        comparison = replace(compare((1.0, 5.0), w2a4=(1.2, 5.3), w3a3=(2.0, 3.0)), tuned=tuned)
        assert ("loss on the proxy after a short fine-tuning 3.0000" in str(comparison)) is tuned
        data = comparison.to_dict()
        assert UniformComparison.from_dict(data) == comparison
        assert (data["best"], data["better"]) == ("w3a3", False)
