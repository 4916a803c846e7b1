import math

import pytest
import torch

from asga.search.dual import DualAscent


def settled(*metrics: str, **multipliers: float) -> DualAscent:
    """Past the descent of the target, which is 1 from here on; gradients are equally long."""
    dual = DualAscent(list(metrics), 1)
    dual.step(dict.fromkeys(metrics, 1.0), dict.fromkeys(metrics, 1.0))
    dual.multipliers = {**dual.multipliers, **multipliers}
    return dual


class TestWeights:
    def test_start_at_zero(self):
        """At first the target is the cost itself."""
        assert DualAscent(["bitops"], 100).step({"bitops": 1.7}, {"bitops": 1.0}) == {"bitops": 0.0}

    def test_are_multiplier_and_violation(self):
        dual = settled("bitops", "size_bits", bitops=0.5, size_bits=0.25)
        ratios = {"bitops": 1.0, "size_bits": 1.0}
        weights = dual.step({"bitops": 1.1, "size_bits": 1.0}, ratios)
        assert weights == pytest.approx({"bitops": 0.5 + 40 * 0.1, "size_bits": 0.25})
        assert dual.multipliers == pytest.approx({"bitops": 0.5 + 0.2 * 0.1, "size_bits": 0.25})

    def test_spare_budget_pulls_up_the_metric_nearest_to_its_limit(self):
        dual = settled("bitops", "size_bits")
        weights = dual.step({"bitops": 0.5, "size_bits": 0.9}, {"bitops": 1.0, "size_bits": 1.0})
        assert weights == pytest.approx({"bitops": 0, "size_bits": -4})  # 40 * (0.9 - 1)

    def test_one_metric_at_its_limit_leaves_the_spare_of_the_other_alone(self):
        dual = settled("bitops", "size_bits")
        weights = dual.step({"bitops": 0.5, "size_bits": 1.1}, {"bitops": 1.0, "size_bits": 1.0})
        assert weights == pytest.approx({"bitops": 0, "size_bits": 4})


class TestRatio:
    def test_is_the_unit_of_the_weights(self):
        dual = DualAscent(["bitops"], 1)
        dual.step({"bitops": 1.0}, {"bitops": 3.0})
        assert dual.step({"bitops": 1.1}, {"bitops": 3.0}) == pytest.approx({"bitops": 3 * 40 * 0.1})

    def test_is_a_mean_over_the_first_steps_that_forgets_later(self):
        dual = DualAscent(["bitops"], 1)
        for ratio in (1.0, 2.0, 6.0):
            dual.step({"bitops": 1.0}, {"bitops": ratio})
        assert dual.state_dict()["ratios"] == pytest.approx({"bitops": 3.0})
        for _ in range(200):
            dual.step({"bitops": 1.0}, {"bitops": 7.0})
        assert dual.state_dict()["ratios"] == pytest.approx({"bitops": 7.0}, rel=1e-3)

    @pytest.mark.parametrize("odd", [math.nan, math.inf, 0.0])
    def test_of_a_step_left_out_does_not_count(self, odd):
        dual = settled("bitops")
        assert dual.step({"bitops": 1.1}, {"bitops": odd}) == pytest.approx({"bitops": 4.0})
        assert dual.state_dict()["ratios"] == {"bitops": 1.0}
        assert DualAscent(["bitops"], 1).step({"bitops": 1.0}, {"bitops": odd}) == {"bitops": 0.0}


class TestMultipliers:
    def test_target_falls_to_the_budget_over_half_of_the_search(self):
        dual = DualAscent(["bitops"], 8)
        moves = []
        for _ in range(8):
            before = dual.multipliers["bitops"]
            dual.step({"bitops": 3.0}, {"bitops": 1.0})
            moves.append((dual.multipliers["bitops"] - before) / 0.2)
        # Targets 3, 2.5, 2, 1.5, 1, 1, 1, 1.
        assert moves == pytest.approx([0, 0.5, 1, 1.5, 2, 2, 2, 2])

    def test_only_that_of_the_metric_nearest_to_its_limit_goes_below_zero(self):
        dual = settled("bitops", "size_bits", bitops=0.05, size_bits=0.05)
        for _ in range(5):
            dual.step({"bitops": 0.8, "size_bits": 0.9}, {"bitops": 1.0, "size_bits": 1.0})
        assert dual.multipliers == pytest.approx({"bitops": 0.0, "size_bits": 0.05 - 5 * 0.2 * 0.1})
        dual.step({"bitops": 1.1, "size_bits": 0.9}, {"bitops": 1.0, "size_bits": 1.0})
        assert dual.multipliers == pytest.approx({"bitops": 0.2 * 0.1, "size_bits": 0.0})


@pytest.mark.parametrize("pull", [-10.0, -0.1, 0.001, 0.3, 100.0])
@pytest.mark.parametrize("steps", [100, 1000])
def test_cost_ends_at_the_budget(pull, steps):
    """Layers want their costs up or down with forces of any size: the multiplier finds what holds them at the limit."""
    generator = torch.Generator().manual_seed(0)
    forces = pull * torch.rand(10, generator=generator)
    logits = torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.03, betas=(0.9, 0.99))
    dual = DualAscent(["bitops"], steps)
    for _ in range(steps):
        cost = 3 * torch.sigmoid(logits).mean()  # 1.5 at first
        loss = -(forces * torch.sigmoid(logits)).sum()
        of_loss, of_cost = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, cost))
        ratio = (of_loss.norm() / of_cost.norm()).item()
        weight = dual.step({"bitops": cost.item()}, {"bitops": ratio})["bitops"]
        logits.grad = of_loss + weight * of_cost
        optimizer.step()
    assert 3 * torch.sigmoid(logits).mean().item() == pytest.approx(1, abs=0.02)


def test_state_continues_exactly():
    costs = [2.0, 1.8, 1.5, 1.2, 1.1, 0.9]
    whole, first = DualAscent(["bitops"], 6), DualAscent(["bitops"], 6)
    for cost in costs:
        whole.step({"bitops": cost}, {"bitops": cost})
    for cost in costs[:3]:
        first.step({"bitops": cost}, {"bitops": cost})
    second = DualAscent(["bitops"], 6)
    second.load_state_dict(first.state_dict())
    first.step({"bitops": 5.0}, {"bitops": 5.0})  # the state is a copy
    for cost in costs[3:]:
        second.step({"bitops": cost}, {"bitops": cost})
    assert second.state_dict() == whole.state_dict()
