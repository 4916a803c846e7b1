"""Memory that is kept from step to step: new pages cost more than a sweep, and CUDA graphs need the same ones."""

import torch
from torch import Tensor


class Memory:
    """Room for the old weights and the first gradients, by the parameter that they belong to.

    Attributes:
        backups: Of the weights.
        first_grads: Copies of g0 where the gradient itself cannot be kept.
    """

    def __init__(self) -> None:
        self.backups: dict[Tensor, Tensor] = {}
        self.first_grads: dict[Tensor, Tensor] = {}
        self._marks: dict[tuple[object, ...], Tensor] = {}

    def backup(self, owner: Tensor, like: Tensor) -> Tensor:
        """Room for the weights of a parameter, whose values on this rank are `like`."""
        return _room(self.backups, owner, like)

    def first_grad(self, owner: Tensor, like: Tensor) -> Tensor:
        """Room for a copy of its gradient `like`."""
        return _room(self.first_grads, owner, like)

    def mark(self, like: Tensor, value: float) -> Tensor:
        """One value on the device and in the dtype of a tensor."""
        key = (like.device, like.dtype, value)
        if key not in self._marks:
            # A fill: a tensor of given values would be copied from the host, which a GPU waits for.
            self._marks[key] = like.new_full((1,), value)
        return self._marks[key]


def _room(rooms: dict[Tensor, Tensor], owner: Tensor, like: Tensor) -> Tensor:
    found = rooms.get(owner)
    if found is None or (found.shape, found.dtype, found.device) != (like.shape, like.dtype, like.device):
        found = rooms[owner] = torch.empty_like(like, requires_grad=False)
    return found
