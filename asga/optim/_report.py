"""What a step saw: scalars that stay on the device until somebody asks."""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from asga.optim._pending import Pending
from asga.optim.radius import Radius

# A radius on one bound for more than this share of the steps is in effect constant; before 100 steps a share
# says little.
_STUCK_SHARE, _STUCK_AFTER = 0.9, 100


class LastStep(NamedTuple):
    """Scalars of a step; q0, step and dots (None: not computed) with the factor `scale` of a scaler (None: without).

    `valid` is 0 if it was left out.
    """

    valid: Tensor
    h: Tensor
    rho: Tensor
    q0: Tensor
    step: Tensor
    dots: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def none(cls, device: torch.device) -> "LastStep":
        """Before the first step everything is NaN."""
        unknown = torch.full((), math.nan, dtype=torch.float64, device=device)
        return cls(unknown, unknown, unknown, unknown, unknown)

    @classmethod
    def of(cls, pending: Pending, dots: Tensor | None, coefficients: Tensor) -> "LastStep":
        """What the passes and the decision found."""
        _, _, valid, h = coefficients.unbind()
        return cls(valid, h, pending.rho, pending.q0, pending.step, dots, pending.scale)

    def report(self, radius: Radius) -> dict[str, float]:
        """Read everything at once; see `asga.optim.ASGA.diagnostics`."""
        _, h, rho, q0, step, dots, scale = self
        g0_g0, g0_g1, g1_g1, ascent = (q0.new_full((4,), math.nan) if dots is None else dots).unbind()
        scale = torch.ones_like(q0) if scale is None else scale
        updates = radius.count("updates").clamp(min=1)
        values = {
            "h": h,
            "rho": rho,
            "norm_g0": g0_g0.sqrt() / scale,
            "norm_g1": g1_g1.sqrt() / scale,
            "cosine": g0_g1 / (g0_g0.sqrt() * g1_g1.sqrt()),
            "sigma": 2.0 * h / rho**2,
            "kappa": (ascent - q0) / (q0 * step * scale),
            "share_at_rho_min": radius.count("at_rho_min").double() / updates,
            "share_at_rho_max": radius.count("at_rho_max").double() / updates,
            "steps": radius.count("steps"),
            "skipped": radius.count("skipped"),
        }
        found = dict(zip(values, torch.stack([v.double() for v in values.values()]).tolist(), strict=True))
        if found["steps"] - found["skipped"] >= _STUCK_AFTER:
            _warn_if_stuck(found, radius)
        return found


def _warn_if_stuck(found: dict[str, float], radius: Radius) -> None:
    for bound in ("rho_min", "rho_max"):
        share = found[f"share_at_{bound}"]
        if share > _STUCK_SHARE:
            # Points at the call of `diagnostics`.
            warnings.warn(
                f"the radius was clamped at {bound} = {getattr(radius, bound):g} in {share:.0%} of "
                f'the steps, so it is in effect constant. Raise {bound}, or choose a radius="constant"',
                stacklevel=4,
            )
