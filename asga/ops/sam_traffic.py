"""Counts what the operators of a step read and write, from their arguments: bytes that have to cross the memory bus."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asga.ops.sam_library import OPERATORS

# By operator the lists that are read and those that are written, once each. `params` of the first two sums is read only
# if adaptive, and where a tensor is not perturbed it is not touched by `sam_perturb`; see `_touched`.
LISTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sam_norm": (("params", "grads"), ()),
    "sam_perturb": (("params", "grads"), ("params", "backups", "first_grads")),
    "sam_dots": (("params", "first_grads", "grads"), ()),
    "sam_combine": (("backups", "first_grads", "grads"), ("params", "grads")),
    "sam_sgd": (("backups", "first_grads", "grads", "momentum_buffers"), ("params", "momentum_buffers")),
    "sam_adam": (("backups", "first_grads", "grads", "exp_avgs", "exp_avg_sqs"), ("params", "exp_avgs", "exp_avg_sqs")),
}


class CountTraffic(TorchDispatchMode):
    """Within this ``with`` block, the operators of steps are counted; they run as usual.

    Attributes:
        bytes: Read and written so far, scalars left out.
        calls: Of every operator, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count one call and make it."""
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace == "asga" and name in OPERATORS:
            self.calls[name] += 1
            self.bytes += traffic(name, args)
        return func(*args, **(kwargs or {}))


def traffic(name: str, args: Sequence[object]) -> int:
    """Bytes that a call of an operator reads and writes; none for those of a few scalars.

    Args:
        name: Such as "sam_norm".
        args: Of the call, in order. A valid step is taken for granted.
    """
    if name not in LISTS:
        return 0
    schema = getattr(torch.ops.asga, name).default._schema
    named = {argument.name: value for argument, value in zip(schema.arguments, args, strict=True)}
    return sum(_bytes(tensors) for kind in LISTS[name] for tensors in (_touched(name, of, named) for of in kind))


def _touched(name: str, of: str, named: dict[str, object]) -> list[Tensor]:
    """The tensors of a list that a call looks at."""
    tensors = list(named[of])
    scales = named.get("rho_scales")
    if of == "params" and name in ("sam_norm", "sam_dots") and not named["adaptive"]:
        return []
    only_perturbed = name == "sam_norm" or (of in ("params", "backups") and scales is not None)
    if only_perturbed:
        tensors = [tensor for tensor, scale in zip(tensors, scales, strict=True) if scale != 0]
    if name == "sam_perturb" and of == "grads" and not named["first_grads"]:
        tensors = [tensor for tensor, scale in zip(tensors, scales, strict=True) if scale != 0]
    return tensors


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
