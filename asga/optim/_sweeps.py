"""The sweeps of one step: the operators `torch.ops.asga.sam_*` over all lists, and what they leave to be added up.

Scalars are float64 tensors on one device, that of the radius, and are never read by the host.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from asga.optim._lists import Lists, local
from asga.optim._ranks import add_over_shards


def ascent_norm(lists: list[Lists], adaptive: bool, device: torch.device) -> Tensor:
    """A1: ``||T g0||^2`` over all perturbed tensors."""
    sums = [torch.ops.asga.sam_norm.default(one.params, one.grads, one.rho_scales, adaptive) for one in lists]
    return _total(lists, sums, device, ())


class Backup(NamedTuple):
    """Old bits of some parameters; `done`, one value on the device, is 1 from the moment on that they are there."""

    owners: list[Tensor]
    kept: list[Tensor]
    scales: list[float]
    done: Tensor


def perturb(
    lists: Lists,
    kept: list[Tensor],
    first_grads: list[Tensor],
    step: Tensor,
    adaptive: bool,
    backups: list[Backup],
) -> None:
    """A3 over some tensors, noted in `backups`.

    An interrupt may come right before or right after the sweep. The note is made before it, and one parameter more,
    whose backup is `done`, tells whether the sweep has run.
    """
    # Fills: a tensor of given values would be copied from the host, which a GPU waits for.
    one, done, zero = lists.params[0].new_ones(1), lists.params[0].new_zeros(1), lists.grads[0].new_zeros(1)
    backups.append(Backup(lists.owners, kept, lists.rho_scales, done))
    copies = [*first_grads, torch.empty_like(zero)] if first_grads else []
    torch.ops.asga.sam_perturb.default(
        [*lists.params, one],
        [*kept, done],
        copies,
        [*lists.grads, zero],
        step.to(lists.device),
        [*lists.rho_scales, 1.0],
        adaptive,
    )
    torch.autograd.graph.increment_version(lists.params)


def by_owner(backups: list[Backup], *, only_done: bool = False) -> dict[Tensor, Tensor]:
    """The backups of all parameters that have moved; `only_done` waits for the device."""
    return {
        owner: kept
        for backup in backups
        if not only_done or backup.done.item() == 1
        for owner, kept, scale in zip(backup.owners, backup.kept, backup.scales, strict=True)
        if scale > 0
    }


def gradient_dots(
    lists: list[Lists],
    first_grads: dict[Tensor, Tensor] | None,
    backups: dict[Tensor, Tensor],
    *,
    adaptive: bool,
    device: torch.device,
) -> Tensor:
    """B1: the four dot products over all tensors; only <g1, g1> without `first_grads`."""
    sums = []
    for one in lists:
        nothing = one.params[0].new_empty(0)
        first = [] if first_grads is None else one.parallel(first_grads, [nothing] * len(one.params))
        at_theta = one.parallel(backups, one.params)
        sums.append(torch.ops.asga.sam_dots.default(at_theta, first, one.grads, one.rho_scales, adaptive))
    return _total(lists, sums, device, (4,))


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


def restore(backups: dict[Tensor, Tensor]) -> None:
    """Copy the old bits back, by owner. Subtracting the perturbation would not give them."""
    for owner, kept in backups.items():
        local(owner).copy_(kept)


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
