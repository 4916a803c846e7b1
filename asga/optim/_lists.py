"""Parameters and gradients as the operators of a step take them: in lists of one device, dtype and ownership.

Of a sharded tensor (DTensor) the lists hold the local shard; sums over them are then added over the process groups of
the sharded dimensions, which are part of what is kept apart.
"""

import sys
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from asga.optim._checks import check_dense, check_maximize, check_rho_scale


@dataclass
class Lists:
    """The arguments of one call; the lists are parallel.

    Attributes:
        group: The parameter group of all of them, or the first of several.
        shards: Process groups over which a sum over the tensors is still to be added up.
        owned: Whether the gradients may be kept without a copy.
        owners: The parameters as the user knows them.
        params: Their values on this rank.
        grads: Their gradients on this rank.
        rho_scales: Of each.
    """

    group: dict[str, object]
    shards: tuple[object, ...]
    owned: bool
    owners: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    rho_scales: list[float] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.params[0].device

    def parallel(self, tensors: dict[Tensor, Tensor], missing: list[Tensor]) -> list[Tensor]:
        """A list parallel to the others, from tensors by owner."""
        return [tensors.get(owner, other) for owner, other in zip(self.owners, missing, strict=True)]


def collect(
    groups: list[dict[str, object]], *, apart: bool, may_keep: bool = False, still: Collection[Tensor] = ()
) -> list[Lists]:
    """All tensors with a gradient and at least one element.

    Args:
        groups: The parameter groups.
        apart: Whether to keep the groups apart, whose options differ.
        may_keep: Whether to keep gradients that only the parameter holds apart from the others.
        still: Parameters that are not to be perturbed.

    Raises:
        RuntimeError: No parameter has a gradient.
        TypeError: A gradient is sparse or complex.
        ValueError: `rho_scale` or `maximize` of a group has been set to something out of range.
    """
    found: dict[tuple[object, ...], Lists] = {}
    any_gradient = False
    for number, group in enumerate(groups):
        check_rho_scale(group)
        check_maximize(group)
        for index, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            any_gradient = True
            held = may_keep and held_elsewhere(param)
            check_dense(param.grad, "the gradient of ", group, index)
            values, grad, shards = local_tensors(param)
            if values.numel() == 0 and not shards:
                continue
            owned = may_keep and not held and is_unaliased(grad)
            key = (values.device, values.dtype, grad.dtype, shards, owned, number if apart else None)
            lists = found.get(key)
            if lists is None:
                lists = found[key] = Lists(group, shards, owned)
            lists.owners.append(param)
            lists.params.append(values)
            lists.grads.append(grad)
            lists.rho_scales.append(0.0 if param in still else group["rho_scale"])
    if not any_gradient:
        raise RuntimeError("no parameter has a gradient: call backward() on the loss first")
    return list(found.values())


def local_tensors(param: Tensor) -> tuple[Tensor, Tensor, tuple[object, ...]]:
    """Values and gradient on this rank, and the process groups over which the parameter is sharded."""
    grad = param.grad
    if not hasattr(param, "to_local"):
        return param, grad, ()
    if grad.placements != param.placements:
        param.grad = grad = grad.redistribute(placements=param.placements)
    mesh = param.device_mesh
    # Not is_shard(): it is False for the strided shards of tensor parallelism under FSDP2.
    shards = tuple(mesh.get_group(dim) for dim, place in enumerate(param.placements) if not place.is_replicate())
    return param.to_local(), grad.to_local(), shards


def local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor on this rank; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def held_elsewhere(param: Tensor) -> bool:
    """Whether somebody else holds the gradient of a parameter, too, and may write into it."""
    return _references(param) > _ONLY_REFERENCE


def may_be_of_a_graph(tensor: Tensor) -> bool:
    """Whether a CUDA graph of torch.compile (mode="reduce-overhead") may own the memory, and write over it when run.

    Its tensors look like any others, so all are taken for such as soon as torch has loaded what manages them.
    """
    return tensor.is_cuda and "torch._inductor.cudagraph_trees" in sys.modules


def is_unaliased(grad: Tensor) -> bool:
    """Whether the memory of a gradient is its own, so that no other tensor can write into it.

    Not so for views: DDP (`gradient_as_bucket_view`) and FSDP write the next gradients into the same memory.
    """
    if grad._base is not None or grad.storage_offset() != 0 or may_be_of_a_graph(grad):
        return False
    storage = grad.untyped_storage()
    alone = _HOLDERS_OF_ONE is not None and _holders(storage) == _HOLDERS_OF_ONE
    return alone and storage.nbytes() == grad.numel() * grad.element_size()


def _holders(storage: torch.UntypedStorage) -> int | None:
    """How many tensors and handles hold a storage, this one included; None where torch does not say."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return None if count is None else count(storage._cdata)


def _references(param: Tensor) -> int:
    """How many hold the object that the gradient of a parameter is in Python."""
    return sys.getrefcount(param.grad)


# Of a gradient that only the parameter holds.
_PARAM = torch.nn.Parameter(torch.empty(1))
_PARAM.grad = torch.empty(1)
_ONLY_REFERENCE = _references(_PARAM)

# Of a tensor that is surely alone.
_ALONE = torch.empty(1)
_HOLDERS_OF_ONE = _holders(_ALONE.untyped_storage())
