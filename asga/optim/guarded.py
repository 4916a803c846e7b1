"""Plain SGD that, like ASGA, does nothing where the loss or a gradient is not finite."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from asga.optim.batchnorm import restore_running_statistics, save_running_statistics


class GuardedSGD(torch.optim.SGD):
    """`torch.optim.SGD` for comparisons with `ASGA`: one pass a step, and the same guard.

    Args:
        params: As for `torch.optim.SGD`.
        model: A module whose normalization layers get their running statistics back when a step is left out.
        **options: Those of `torch.optim.SGD`.

    Attributes:
        last_skipped: Whether the last step was left out.
    """

    last_skipped = False

    def __init__(self, params: ParamsT, *, model: nn.Module, **options: object) -> None:
        super().__init__(params, **options)
        self._model = model

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Make one step, or none where the loss or the norm of the gradient is NaN or infinite.

        Args:
            closure: Clears the gradients, computes the loss of a batch, calls backward and returns the loss.

        Returns:
            The loss.
        """
        statistics = save_running_statistics(self._model)
        with torch.enable_grad():
            loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.isfinite(loss.detach() + torch.nn.utils.get_total_norm(gradients))
        self.last_skipped = not finite
        if self.last_skipped:
            restore_running_statistics(self._model, statistics)
        else:
            super().step()
        return loss
