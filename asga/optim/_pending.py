"""A step between its two passes: what has to survive from the first to the second, and the way back."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from asga.optim._checks import check_loss
from asga.optim._lists import Lists, local
from asga.optim._memory import Memory
from asga.optim._ranks import Ranks
from asga.optim.batchnorm import RunningStatistics, choose_running_statistics, restore_running_statistics


class Backup(NamedTuple):
    """Old bits of some parameters; `done`, one value on the device, is 0 until they are there."""

    owners: list[Tensor]
    kept: list[Tensor]
    scales: list[float]
    done: Tensor


@dataclass
class Pending:
    """Scalars are float64 on the device of the radius.

    Attributes:
        losses: That of pass 1 if it is known, and room for that of pass 2; see `add_loss`.
        rho: The radius of this step.
        scale: The factor of a GradScaler, or None.
        q0: ``||T g0||^2``.
        step: The length s of the ascent step.
        first_grads: g0 by parameter; None where nothing will use it.
        statistics: Running statistics of the model as pass 1 left them, or None.
        statistics_before: As they were before pass 1, where that is known.
        backups: Of the parameters that are perturbed so far.
    """

    losses: Tensor
    rho: Tensor
    scale: Tensor | None
    q0: Tensor
    step: Tensor
    first_grads: dict[Tensor, Tensor] | None
    statistics: RunningStatistics | None = None
    statistics_before: RunningStatistics | None = None
    backups: list[Backup] = field(default_factory=list)

    def perturb(self, lists: Lists, memory: Memory, *, adaptive: bool) -> None:
        """A3 over some tensors.

        An interrupt may come right before or right after the sweep. What is kept is noted before it, and one parameter
        more, whose backup is `Backup.done`, tells whether the sweep has run.
        """
        kept = [
            param if scale == 0 else memory.backup(owner, param)
            for owner, param, scale in zip(lists.owners, lists.params, lists.rho_scales, strict=True)
        ]
        copies: list[Tensor] = []
        if self.first_grads is not None:
            if not lists.owned:
                copies = [memory.first_grad(*pair) for pair in zip(lists.owners, lists.grads, strict=True)]
            self.first_grads.update(zip(lists.owners, copies or lists.grads, strict=True))
        one, zero = memory.mark(lists.params[0], 1.0), memory.mark(lists.grads[0], 0.0)
        done = torch.zeros_like(one)
        self.backups.append(Backup(lists.owners, kept, lists.rho_scales, done))
        torch.ops.asga.sam_perturb.default(
            [*lists.params, one],
            [*kept, done],
            [*copies, torch.empty_like(zero)] if copies else [],
            [*lists.grads, zero],
            self.step.to(lists.device),
            [*lists.rho_scales, 1.0],
            adaptive,
        )
        torch.autograd.graph.increment_version(lists.params)

    def old_weights(self, *, only_done: bool = False) -> dict[Tensor, Tensor]:
        """The backups of all parameters that have moved; `only_done` waits for the device."""
        return {
            owner: kept
            for backup in self.backups
            if not only_done or backup.done.item() != 0
            for owner, kept, scale in zip(backup.owners, backup.kept, backup.scales, strict=True)
            if scale > 0
        }

    def first_grads_of(self, lists: Lists) -> list[Tensor]:
        """g0 of some tensors as the operators take them; without elements where there was none."""
        if self.first_grads is None:
            return []
        return lists.parallel(self.first_grads, [lists.params[0].new_empty(0)] * len(lists.params))

    def average_first_grads(self, params: list[Tensor], ranks: Ranks) -> None:
        """Average g0 over all processes, zeros for the parameters that have none on this one."""
        if self.first_grads is not None and ranks.several:
            # The same parameters in the same order on every process, whichever have a gradient there.
            self.first_grads.update({p: torch.zeros_like(p) for p in params if p not in self.first_grads})
            ranks.average_([self.first_grads[p] for p in params])

    def add_loss(self, loss: Tensor | float | None) -> None:
        """Put the loss of pass 2 into its room, or give that up; `losses` are those that are known from now on."""
        if loss is None:
            self.losses = self.losses[:-1]
        else:
            write_loss(loss, self.losses[-1:])

    def restore(self, model: nn.Module | None) -> None:
        """Abandon the step; waits for the device."""
        copy_back(self.old_weights(only_done=True))
        if self.statistics is not None:
            restore_running_statistics(model, self.statistics)

    def restore_statistics(self, model: nn.Module | None, coefficients: Tensor) -> None:
        """Those of pass 1 if the step is valid, else those before it where they are known."""
        if self.statistics is None:
            return
        statistics = self.statistics
        if self.statistics_before is not None:
            statistics = choose_running_statistics(coefficients[2] != 0, statistics, self.statistics_before)
        restore_running_statistics(model, statistics)


def write_loss(loss: Tensor | float, place: Tensor) -> None:
    """Write a loss of any dtype into a tensor of one value, without waiting for the device.

    Raises:
        TypeError: It is not a number.
        ValueError: It has more than one value.
    """
    check_loss("loss", loss)
    if hasattr(loss, "full_tensor"):
        loss = loss.full_tensor()
    if isinstance(loss, Tensor):
        place.copy_(loss.detach().reshape(1))
    else:
        place.fill_(loss)


def copy_back(backups: dict[Tensor, Tensor]) -> None:
    """Copy the old bits back, by owner. Subtracting the perturbation would not give them."""
    for owner, kept in backups.items():
        local(owner).copy_(kept)
