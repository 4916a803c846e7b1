"""The sweeps of one step: the operators `torch.ops.asga.sam_*` over all lists, and what they leave to be added up.

Scalars are float64 tensors on one device, that of the radius, and are never read by the host.
"""

import torch
from torch import Tensor

from asga.optim._lists import Lists
from asga.optim._pending import Pending
from asga.optim._ranks import add_over_shards


def ascent_norm(lists: list[Lists], adaptive: bool, device: torch.device) -> Tensor:
    """A1: ``||T g0||^2`` over all perturbed tensors."""
    sums = [torch.ops.asga.sam_norm.default(one.params, one.grads, one.rho_scales, adaptive) for one in lists]
    return _total(lists, sums, device, ())


def gradient_dots(
    lists: list[Lists], pending: Pending, backups: dict[Tensor, Tensor], *, full: bool, adaptive: bool
) -> Tensor:
    """B1: the four dot products over all tensors; only <g1, g1> unless `full`."""
    sums = []
    for one in lists:
        first = pending.first_grads_of(one) if full else []
        at_theta = one.parallel(backups, one.params)
        sums.append(torch.ops.asga.sam_dots.default(at_theta, first, one.grads, one.rho_scales, adaptive))
    return _total(lists, sums, pending.q0.device, (4,))


def combine(lists: Lists, backups: list[Tensor], first_grads: list[Tensor], coefficients: Tensor) -> None:
    """B3 for any base optimizer: restore, and write d in place of g1."""
    for index, (owner, grad) in enumerate(zip(lists.owners, lists.grads, strict=True)):
        if grad is owner.grad and any(
            n > 1 and stride == 0 for n, stride in zip(grad.shape, grad.stride(), strict=True)
        ):
            # Expanded: several values in one place cannot be written.
            owner.grad = lists.grads[index] = grad.clone()
    coefficients = coefficients.to(lists.device)
    torch.ops.asga.sam_combine.default(lists.params, backups, first_grads, lists.grads, coefficients)
    torch.autograd.graph.increment_version(lists.params)


def _total(lists: list[Lists], sums: list[Tensor], device: torch.device, shape: tuple[int, ...]) -> Tensor:
    """The sum over all lists, those of sharded tensors added up over their shards before."""
    by_shards: dict[tuple[object, ...], Tensor] = {}
    for one, value in zip(lists, sums, strict=True):
        value = value.to(device)
        known = by_shards.get(one.shards)
        by_shards[one.shards] = value if known is None else known + value
    total = None
    for shards, value in by_shards.items():
        value = add_over_shards(value, shards)
        total = value if total is None else total + value
    return torch.zeros(shape, dtype=torch.float64, device=device) if total is None else total
