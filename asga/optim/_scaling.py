"""The factor of a `torch.amp.GradScaler`: read once for both passes, and told afterwards whether it was too large."""

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState


def grad_scale(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | None:
    """The factor S that the gradients of a step carry, 0-dim float64; None without a scaler.

    It is what a loss of one would be scaled to, so that the host need not read it.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.scale(torch.ones((), dtype=torch.float64, device=device))


class Witness:
    """Tells a scaler whether a step was valid, for its next `update`.

    A scaler learns it by looking for infinities in the gradients of an optimizer. The gradients of both passes have
    been looked at already; a single value that is infinite or zero says the same.
    """

    def __init__(self, device: torch.device) -> None:
        self._value = torch.nn.Parameter(torch.zeros(1, device=device))
        self._optimizer = torch.optim.SGD([self._value])

    def check_ready(self, scaler: torch.amp.GradScaler | None, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a step for which the scaler is not ready.

        Raises:
            RuntimeError: It has not been updated since the step before, or has divided the gradients already.
        """
        if scaler is None or not scaler.is_enabled():
            return
        if id(self._optimizer) in scaler._per_optimizer_states:
            raise RuntimeError("scaler.update() has not been called since the last step")
        state = scaler._per_optimizer_states.get(id(optimizer))
        if state is not None and state["stage"] is OptState.UNSCALED:
            raise RuntimeError(
                "scaler.unscale_() has been called on this optimizer, which divides by the factor itself: leave it out "
                "(max_norm clips)"
            )

    def report(self, scaler: torch.amp.GradScaler, valid: Tensor) -> None:
        """Have the scaler find an infinity unless `valid`, a 0-dim bool that the host does not read."""
        self._value.grad = torch.where(valid, 0.0, torch.inf).to(self._value.dtype).reshape(1)
        scaler.unscale_(self._optimizer)
