import math

import pytest
import torch
from torch import nn

from asga.optim import ASGA
from asga.optim.guarded import GuardedSGD
from asga.recovery import Recovery, copied, halve_steps
from asga.steps import TrainingError, cosine_with_warmup

NAN, INF = math.nan, math.inf


class Number:
    """A part whose state is one number, in a tensor."""

    def __init__(self) -> None:
        self.value = torch.zeros(())

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class Training:
    """A number that every step adds one to, watched; every `keep_every` steps it is kept, if that step was good."""

    def __init__(self, steps: int = 1000, keep_every: int = 20) -> None:
        self.number, self.softened, self.said = Number(), [], []
        self.recovery = Recovery({"number": self.number}, self._soften, steps)
        self._step, self._keep_every = 0, keep_every
        self._keep()

    def _soften(self) -> str:
        self.softened.append(self.number.value.item())
        return "slower"

    def _keep(self) -> None:
        self.recovery.keep({"number": copied(self.number.state_dict()), "other": {}}, f"step {self._step}")

    def run(self, losses) -> "Training":
        for loss in losses:
            self._step += 1
            self.number.value += 1
            self.said.append(self.recovery.watch(loss, skipped=not math.isfinite(loss)))
            if self._step % self._keep_every == 0 and self.recovery.well:
                self._keep()
        return self


class TestRecovery:
    def test_goes_back_after_ten_in_a_row(self):
        training = Training().run([1.0] * 25 + [NAN] * 9 + [1.0] + [NAN] * 9)
        assert training.said == [None] * 44
        assert training.number.value == 44
        training.run([INF])
        # Of step 20: step 40 was left out.
        assert training.said[-1] == "the loss is inf for 10 steps in a row: back to step 20, slower"
        assert training.number.value == 20
        assert training.softened == [20]

    def test_gradients(self):
        recovery = Training().run([1.0]).recovery
        said = [recovery.watch(1.0, skipped=True) for _ in range(10)]
        assert said[-1] == "the gradients are not finite for 10 steps in a row: back to step 0, slower"

    def test_gives_up_when_it_does_not_help(self):
        training = Training().run([1.0] * 25 + [NAN] * 39)
        assert training.softened == [20] * 3
        message = (
            "the loss is nan for 10 steps in a row, and again after each of 3 returns to step 20. The learning rate"
        )
        with pytest.raises(TrainingError, match=message):
            training.run([NAN])
        assert training.number.value == 20

    def test_starts_anew_after_a_good_state(self):
        training = Training().run([1.0] * 5 + ([NAN] * 10 + [1.0] * 20) * 6)
        assert len(training.softened) == 6

    @pytest.mark.parametrize(("steps", "most"), [(1000, 10), (3, 3)])
    def test_gives_up_at_once_when_no_step_was_good(self, steps, most):
        training = Training(steps).run([NAN] * (most - 1))
        with pytest.raises(TrainingError, match=f"the loss is nan for {most} steps in a row. The learning rate"):
            training.run([NAN])
        assert training.number.value == 0
        assert training.softened == []

    @pytest.mark.parametrize(
        ("losses", "well"),
        [
            ([2.0] * 40, True),
            ([2.0] * 36 + [10.0, 1e3], False),
            ([2.0] * 36 + [10.0, 1e3, 1e6, 1e9], False),
            ([2.0] * 39 + [19.0], True),
            ([1e-4] * 39 + [0.1], True),
            ([1e-4] * 39 + [11.0], False),
            ([2.0] * 39 + [NAN], False),
            ([-5.0] * 40, True),
        ],
        ids=[
            "steady",
            "begins to diverge",
            "diverges",
            "hard",
            "next to none left",
            "far from it",
            "left out",
            "below 0",
        ],
    )
    def test_well(self, losses, well):
        assert Training().run(losses).recovery.well is well

    def test_what_is_kept_is_not_trained_on(self):
        """Also after going back: parts work in what they load."""
        training = Training().run([1.0] * 20).run([NAN] * 10)
        training.run([NAN] * 10)
        assert training.softened == [20, 20]

    @pytest.mark.parametrize("at", range(1, 70))
    def test_state_dict(self, at):
        """Another one that takes it over goes on in the same way."""
        losses = [1.0] * 25 + [NAN] * 12 + [1.0] * 5 + [NAN] * 15 + [1.0] * 13
        whole = Training().run(losses)
        before, after = Training().run(losses[:at]), Training()
        after.recovery = Recovery({"number": after.number}, after._soften, 1000)
        after.recovery.load_state_dict(before.recovery.state_dict())
        assert len(after.softened) == len(before.softened)
        after.number.value, after._step = before.number.value.clone(), at
        after.run(losses[at:])
        assert before.said + after.said == whole.said
        assert after.number.value == whole.number.value


class TestHalveSteps:
    def _make(self, method, **options):
        model = nn.Linear(2, 2)
        if method == "asga":
            optimizer = ASGA(model.parameters(), lr=0.1, rho_max=0.4, rho_min=0.15, model=model, **options)
        else:
            optimizer = GuardedSGD(model.parameters(), lr=0.1, model=model)
        scheduler = cosine_with_warmup(optimizer, steps=100, warmup=0)
        return optimizer, scheduler, halve_steps(optimizer, scheduler)

    def test_of_asga(self):
        optimizer, scheduler, halve = self._make("asga", radius="constant")
        optimizer.param_groups[0]["lr"] = 3.0  # as after going back to the rate of then
        assert halve() == "half the radius (rho_max is now 0.2)"
        assert (optimizer.rho_max, optimizer.rho.item()) == (0.2, 0.2)
        assert halve() == "half the radius (rho_max is now 0.1)"
        assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == 0.1

    def test_of_sgd(self):
        """The whole schedule is halved, and the state dict of the scheduler knows."""
        optimizer, scheduler, halve = self._make("sgd")
        optimizer._opt_called = True  # a scheduler warns where no step was made before
        for _ in range(50):
            scheduler.step()
        assert halve() == "half the learning rate"
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.1 * 0.5)
        again, resumed, _ = self._make("sgd")
        resumed.load_state_dict(scheduler.state_dict())
        for one in (scheduler, resumed):
            for _ in range(10):
                one.step()
        expected = 0.5 * 0.1 * (0.5 + 0.5 * math.cos(math.pi * 0.6))
        for one in (optimizer, again):
            assert one.param_groups[0]["lr"] == pytest.approx(expected)
