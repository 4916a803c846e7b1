"""The perturbation radius: a scalar on the device that follows the surrogate gap."""

import math

import torch
from torch import Tensor


class Radius:
    """The radius rho and its rule, ``rho <- clamp(log(1 + max(h, 0)), rho_min, rho_max)`` or constant.

    The bare rule ``min(rho_max, log(1 + h))`` behaves like ``rho <- rho * ||g||`` near zero: with gradient
    norms below one it falls to exactly 0 within tens of steps and cannot leave, and a negative gap makes it
    negative. Hence the lower bound and the ``max``. How often either bound was hit is counted, because a
    radius that sits on a bound is a constant radius under another name.

    An adaptive radius starts at ``sqrt(rho_min * rho_max)``, halfway between the bounds on the logarithmic
    scale on which it moves. All state is 0-dim tensors on `device`, updated in place without host
    synchronization.

    Args:
        rho_min: Lower bound, positive; unused when constant.
        rho_max: Upper bound, or the value itself when constant.
        adaptive: Whether the radius follows the gap.
        device: Where the state lives.

    Source:
        "Learning from Loss Landscape: Generalizable Mixed-Precision Quantization via Adaptive Sharpness-Aware
        Gradient Aligning", ICML 2025 (arXiv 2505.04877), for the rule without its lower bound.
    """

    def __init__(self, rho_min: float, rho_max: float, *, adaptive: bool, device: torch.device) -> None:
        self.rho_min, self.rho_max, self.adaptive = rho_min, rho_max, adaptive
        start = math.sqrt(rho_min * rho_max) if adaptive else rho_max
        self.rho = torch.tensor(start, dtype=torch.float64, device=device)
        self.updates, self.at_rho_min, self.at_rho_max = torch.zeros(3, dtype=torch.int64, device=device).unbind()

    def update(self, gap: Tensor, valid: Tensor) -> None:
        """Move to the radius of the next step (B4).

        Args:
            gap: The surrogate gap h, 0-dim float64. NaN or infinite: the radius stays.
            valid: 0-dim bool; False keeps the radius.
        """
        if not self.adaptive:
            return
        target = torch.log1p(gap.clamp(min=0.0))
        valid = valid & torch.isfinite(gap)
        self.rho.copy_(torch.where(valid, target.clamp(self.rho_min, self.rho_max), self.rho))
        self.updates.add_(valid)
        self.at_rho_min.add_(valid & (target <= self.rho_min))
        self.at_rho_max.add_(valid & (target >= self.rho_max))

    def state(self) -> dict[str, Tensor]:
        """The tensors that make up the state, by name; not copies."""
        return {name: getattr(self, name) for name in ("rho", "updates", "at_rho_min", "at_rho_max")}
