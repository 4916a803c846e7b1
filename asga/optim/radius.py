"""The perturbation radius: a scalar on the device that follows the surrogate gap, or the learning rate, or nothing."""

import math

import torch
from torch import Tensor

from asga.ops.sam_library import COUNTS

RULES = ("adaptive", "constant", "proportional")


class Radius:
    """The radius rho, its rule and the counters of the steps.

    adaptive
        ``rho <- clamp(log(1 + max(h, 0)), rho_min, rho_max)`` after each step, with the gap h. The bare rule
        ``min(rho_max, log(1 + h))`` behaves like ``rho <- rho * ||g||`` near zero: with gradient norms below one it
        falls to exactly 0 within tens of steps and cannot leave, and a negative gap makes it negative. Hence the
        lower bound and the ``max``. How often either bound was hit is counted, because a radius that sits on a
        bound is a constant radius under another name. It starts at ``sqrt(rho_min * rho_max)``, halfway between the
        bounds on the logarithmic scale on which it moves.
    constant
        ``rho = rho_max``.
    proportional
        ``rho = clamp(rho_max * lr / lr_0, rho_min, rho_max)`` before each step: it decays, and warms up, with the
        learning rate. lr_0 is the ``initial_lr`` that a scheduler leaves in the parameter group, or the learning rate
        at the start.

    All state is on `device` and updated in place without host synchronization.

    Args:
        rho_min: Lower bound, positive; unused when constant.
        rho_max: Upper bound, or the value itself when constant.
        rule: One of `RULES`.
        lr: The learning rate at the start, unless a scheduler says otherwise; used when proportional.
        device: Where the state lives.

    Attributes:
        rho: 0-dim float64.
        counts: int64, see `asga.ops.sam_library.COUNTS`.

    Source:
        "Learning from Loss Landscape: Generalizable Mixed-Precision Quantization via Adaptive Sharpness-Aware
        Gradient Aligning", ICML 2025 (arXiv 2505.04877), for the adaptive rule without its lower bound. Zhuang et
        al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022, for the proportional one.
    """

    def __init__(
        self, rho_min: float, rho_max: float, *, rule: str, device: torch.device, lr: float | Tensor = 1.0
    ) -> None:
        self.rho_min, self.rho_max, self.rule = rho_min, rho_max, rule
        start = math.sqrt(rho_min * rho_max) if rule == "adaptive" else rho_max
        self.rho = torch.full((), start, dtype=torch.float64, device=device)
        self.counts = torch.zeros(len(COUNTS), dtype=torch.int64, device=device)
        if isinstance(lr, Tensor):
            self._lr = lr.detach().to(device, torch.float64, copy=True).reshape(())
        else:
            self._lr = torch.full((), lr, dtype=torch.float64, device=device)

    @property
    def follows_gap(self) -> bool:
        """Whether `sam_coefficients` moves it."""
        return self.rule == "adaptive"

    def before_step(self, group: dict[str, object]) -> None:
        """Move it to where the learning rate of a parameter group puts it, if it is proportional to that."""
        if self.rule != "proportional":
            return
        lr, start = group["lr"], group.get("initial_lr", self._lr)
        if not isinstance(start, Tensor) and start == 0:
            raise ValueError("initial_lr is 0 in a parameter group; a radius proportional to lr needs another start")
        # A fill where the host knows the number: a copy from the host would have to be waited for.
        if isinstance(lr, Tensor) and lr.device == self.rho.device:
            self.rho.copy_(lr.detach().reshape(()))
        else:
            self.rho.fill_(float(lr))
        self.rho.div_(start).mul_(self.rho_max).clamp_(self.rho_min, self.rho_max)

    def scale(self, factor: float) -> None:
        """Multiply the radius and its upper bound; the lower bound follows where it would be above that."""
        self.rho_max *= factor
        self.rho_min = min(self.rho_min, self.rho_max)
        self.rho.mul_(factor)

    def bound(self) -> None:
        """Bring a radius of an earlier run below the bound of this one; a constant one is that of this one.

        One that `scale` has taken below `rho_min` stays there until the next step moves it, as without interruption.
        """
        if self.rule == "constant":
            self.rho.fill_(self.rho_max)
        else:
            self.rho.clamp_(max=self.rho_max)

    def count(self, name: str) -> Tensor:
        """One of the counters, 0-dim; not a copy."""
        return self.counts[COUNTS.index(name)]

    def state(self) -> dict[str, Tensor]:
        """The tensors that make up the state, by name; not copies."""
        found = {"rho": self.rho, **{name: self.count(name) for name in COUNTS}}
        return {**found, "initial_lr": self._lr} if self.rule == "proportional" else found
