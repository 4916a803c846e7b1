"""The factor of a `torch.amp.GradScaler`: read once for both passes, and told afterwards whether it was too large."""

from typing import NamedTuple

import torch
from torch import Tensor


class Scaling(NamedTuple):
    """The factor S that the gradients of a step carry.

    Attributes:
        scale: 0-dim float64, or None without a scaler.
        factor: The same, 1 without a scaler.
    """

    scale: Tensor | None
    factor: Tensor

    @classmethod
    def of(cls, scaler: torch.amp.GradScaler | None, device: torch.device) -> "Scaling":
        """That of a scaler at this moment, without reading it: it is what a loss of one would be scaled to."""
        one = torch.ones((), device=device)
        if scaler is None or not scaler.is_enabled():
            return cls(None, one.double())
        scale = scaler.scale(one).double()
        return cls(scale, scale)


class Witness:
    """Tells a scaler whether a step was valid, for its next `update`.

    A scaler learns it by looking for infinities in the gradients of an optimizer. The gradients of both passes have
    been looked at already; a single value that is infinite or zero says the same.
    """

    def __init__(self, device: torch.device) -> None:
        self._value = torch.nn.Parameter(torch.zeros(1, device=device))
        self._optimizer = torch.optim.SGD([self._value])

    def report(self, scaler: torch.amp.GradScaler, valid: Tensor) -> None:
        """Have the scaler find an infinity unless `valid`, a 0-dim bool that the host does not read."""
        self._value.grad = torch.where(valid, 0.0, torch.inf).to(self._value.dtype).reshape(1)
        scaler.unscale_(self._optimizer)
