import pytest
import torch

from asga.search.dual import DualAscent


def tensors(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}


class TestPenalty:
    def test_starts_at_zero(self):
        """At first the target is the cost itself."""
        assert DualAscent(["bitops"], 100).penalty(tensors(bitops=1.7)).item() == 0

    def test_weighs_every_metric_by_its_own_multiplier(self):
        dual = DualAscent(["bitops", "size_bits"], 100)
        dual.penalty(tensors(bitops=1.0, size_bits=1.0))
        dual.multipliers = {"bitops": 0.5, "size_bits": 0.25}
        costs = tensors(bitops=1.1, size_bits=1.0)
        penalty = dual.penalty(costs)
        penalty.backward()
        # 0.5 + 2 * 0.1, and 0.25 + 2 * 0; the weight itself is a constant.
        assert costs["bitops"].grad.item() == pytest.approx(0.7)
        assert costs["size_bits"].grad.item() == pytest.approx(0.25)
        assert penalty.item() == pytest.approx(0.7 * 1.1 + 0.25)

    def test_spare_budget_pulls_up_the_metric_nearest_to_its_limit(self):
        dual = DualAscent(["bitops", "size_bits"], 100)
        dual.penalty(tensors(bitops=1.0, size_bits=1.0))
        costs = tensors(bitops=0.5, size_bits=0.9)
        dual.penalty(costs).backward()
        assert costs["bitops"].grad.item() == 0
        assert costs["size_bits"].grad.item() == pytest.approx(-0.2)  # 2 * (0.9 - 1)

    def test_one_metric_at_its_limit_leaves_the_spare_of_the_other_alone(self):
        dual = DualAscent(["bitops", "size_bits"], 100)
        dual.penalty(tensors(bitops=1.0, size_bits=1.0))
        costs = tensors(bitops=0.5, size_bits=1.1)
        dual.penalty(costs).backward()
        assert costs["bitops"].grad.item() == 0
        assert costs["size_bits"].grad.item() == pytest.approx(0.2)


class TestUpdate:
    def test_target_falls_to_the_budget_over_half_of_the_search(self):
        dual = DualAscent(["bitops"], 8)
        moves = []
        for _ in range(8):
            before = dual.multipliers["bitops"]
            dual.update({"bitops": 3.0})
            moves.append((dual.multipliers["bitops"] - before) / 0.02)
        # Targets 3, 2.5, 2, 1.5, 1, 1, 1, 1.
        assert moves == pytest.approx([0, 0.5, 1, 1.5, 2, 2, 2, 2])

    def test_multiplier_falls_back_to_zero_and_no_further(self):
        dual = DualAscent(["bitops"], 2)
        for cost in (1.0, 1.5, 0.9, 0.1, 0.1):
            dual.update({"bitops": cost})
        assert dual.multipliers == {"bitops": 0.0}

    def test_a_cost_within_budget_never_raises_the_multiplier(self):
        dual = DualAscent(["bitops"], 10)
        for _ in range(10):
            dual.update({"bitops": 0.9})
        assert dual.multipliers == {"bitops": 0.0}


@pytest.mark.parametrize("pull", [-0.1, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [200, 1000])
def test_cost_ends_at_the_budget(pull, steps):
    """A logit wants the cost up or down, with some force: the multiplier finds what holds it at the limit."""
    logit = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.03, betas=(0.9, 0.99))
    dual = DualAscent(["bitops"], steps)
    for _ in range(steps):
        cost = 3 * torch.sigmoid(logit)  # 1.5 at first
        optimizer.zero_grad()
        (-pull * torch.sigmoid(logit) + dual.penalty({"bitops": cost})).backward()
        optimizer.step()
        dual.update({"bitops": 3 * torch.sigmoid(logit).item()})
    # 5 %: within a few hundred steps the multiplier has not settled yet, the proportional part holds the rest.
    assert 3 * torch.sigmoid(logit).item() == pytest.approx(1, abs=0.05)


def test_state_continues_exactly():
    costs = [2.0, 1.8, 1.5, 1.2, 1.1, 0.9]
    whole, first = DualAscent(["bitops"], 6), DualAscent(["bitops"], 6)
    for cost in costs:
        whole.update({"bitops": cost})
    for cost in costs[:3]:
        first.update({"bitops": cost})
    second = DualAscent(["bitops"], 6)
    second.load_state_dict(first.state_dict())
    first.update({"bitops": 5.0})  # the state is a copy
    for cost in costs[3:]:
        second.update({"bitops": cost})
    assert second.state_dict() == whole.state_dict()
