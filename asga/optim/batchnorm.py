"""Running statistics of normalization layers, kept from moving twice in a step of two forward passes."""

import torch
from torch import Tensor, nn

# The names torch.nn gives the running buffers of BatchNorm1d/2d/3d, SyncBatchNorm and InstanceNorm, and that
# their reimplementations keep for the sake of state dicts.
_BUFFER_NAMES = ("running_mean", "running_var", "num_batches_tracked")


def save_running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copy every running mean, running variance and batch counter of `model`.

    Setting the momentum to 0 for the second pass would not do: an infinite batch statistic times 0 is NaN,
    and the batch counter, which makes the average when momentum is None, would still advance. Copies are
    exact, and the buffers are small.

    Args:
        model: Any module; layers without running statistics, or in eval mode, do no harm.

    Returns:
        Copies by qualified buffer name, for `restore_running_statistics`.
    """
    return {name: buffer.clone() for name, buffer in _running_buffers(model)}


@torch.no_grad()
def restore_running_statistics(model: nn.Module, saved: dict[str, Tensor], *, unless: Tensor | None = None) -> None:
    """Write the copies of `save_running_statistics` back, bit for bit.

    Args:
        model: The module the copies were taken from.
        saved: What `save_running_statistics` returned.
        unless: 0-dim bool, not read by the host; where it is true, nothing is written.
    """
    for name, buffer in _running_buffers(model):
        old = saved[name]
        buffer.copy_(old if unless is None else torch.where(unless.to(buffer.device), buffer, old))


def _running_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in model.named_buffers() if name.rpartition(".")[2] in _BUFFER_NAMES]
