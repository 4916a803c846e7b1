"""Checks of what is handed to `ASGA`: a message names the argument, its value and what would be right."""

import inspect
import math
import numbers
import warnings

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from asga._checks import check_number

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Shapes = list[tuple[tuple[int, ...], ...]]


def check_base(base_optimizer: type[Optimizer]) -> None:
    """A class of optimizer that can step without a closure: gradients are computed before its step."""
    if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
        raise TypeError(
            f"base_optimizer is {base_optimizer!r}; the class of a torch optimizer is needed, such as "
            "torch.optim.SGD, with its options as keyword arguments"
        )
    closure = inspect.signature(base_optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"base_optimizer {base_optimizer.__name__} cannot step without a closure of its own")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")


def check_radius(rho_min: float, rho_max: float, radius: str) -> None:
    """Bounds of the radius; which is larger counts only where the radius moves."""
    check_number("rho_max", rho_max)
    check_number("rho_min", rho_min)
    for name, value in {"rho_max": rho_max, "rho_min": rho_min}.items():
        if value == 0:
            raise ValueError(f"{name} is {value}; it must be positive and finite")
    if radius != "constant" and rho_min > rho_max:
        raise ValueError(f"rho_min is {rho_min}; it must be at most rho_max = {rho_max}")


def check_alpha(alpha: float, variant: str, alpha_mode: str) -> None:
    """The range of alpha depends on what the variant uses it for."""
    check_number("alpha", alpha)
    if variant == "sam" and alpha != 0:
        raise ValueError(f"alpha is {alpha}, but variant 'sam' has none; leave it out or choose another variant")
    if variant in ("aligned", "conflict") and alpha_mode == "relative" and alpha >= 1:
        raise ValueError(f"alpha is {alpha}; as a share of the ascent step (alpha_mode 'relative') it is below 1")


def check_factor(factor: float) -> None:
    """What a radius is multiplied by."""
    if not 0 < factor < math.inf:
        raise ValueError(f"factor is {factor}; it must be positive and finite")


def check_group(group: dict[str, object]) -> None:
    """A parameter group with its defaults filled in."""
    check_rho_scale(group)
    check_maximize(group)
    for index, param in enumerate(group["params"]):
        check_dense(param, "", group, index)
    low = {p.dtype for p in group["params"]} & {torch.bfloat16, torch.float16}
    if low and group["rho_scale"] > 0:
        # Measured on bfloat16 weights at rho = 0.05: 88 % kept their bits.
        warnings.warn(
            f"parameters are {', '.join(sorted(map(str, low)))}: most of a perturbation rounds away. Keep "
            "the weights in float32 and use autocast, or set rho_scale=0 for their group",
            stacklevel=2,
        )


def check_rho_scale(group: dict[str, object]) -> None:
    """How far a parameter group moves in pass 1; groups are open to the user, so every step looks again."""
    if not 0 <= group["rho_scale"] < math.inf:
        raise ValueError(f"rho_scale is {group['rho_scale']} in a parameter group; it must be finite and not negative")


def check_maximize(group: dict[str, object]) -> None:
    """No option of the base optimizer may turn the objective around: pass 1 climbs along the gradient."""
    if group.get("maximize"):
        raise ValueError("maximize is True in a parameter group; negate the loss instead")


def check_memory(groups: list[dict[str, object]]) -> None:
    """Every value in a place of its own: where two share one, the backup of one holds the perturbation of the other."""
    found: dict[int, str] = {}
    for group in groups:
        for index, param in enumerate(group["params"]):
            if type(param) not in (Tensor, torch.nn.Parameter) or param.numel() == 0 or param.device.type == "meta":
                continue
            name = describe(group, index)
            if any(n > 1 and stride == 0 for n, stride in zip(param.shape, param.stride(), strict=True)):
                raise ValueError(f"{name} has several values in one place of its memory (it is expanded): clone it")
            # Sharded training takes memory away for a while: the address is 0 then.
            place = param.data_ptr()
            if place != 0 and (other := found.setdefault(place, name)) is not name:
                raise ValueError(f"{other} and {name} share their memory: make them one parameter, or clone one")


def check_dense(tensor: Tensor, what: str, group: dict[str, object], index: int) -> None:
    """Strided and of a dtype that the sweeps can read; `what` goes before the name of the parameter."""
    if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{what}{describe(group, index)} has layout {tensor.layout} and dtype {tensor.dtype}; it must be dense "
            "and float32, bfloat16, float16 or float64"
        )


def check_loss(name: str, loss: Tensor | float) -> None:
    """One real value, as a tensor or a Python number."""
    if isinstance(loss, bool) or not isinstance(loss, (Tensor, numbers.Real)):
        raise TypeError(f"{name} is {loss!r}; a tensor with one value or a number is needed")
    if isinstance(loss, Tensor) and (loss.numel() != 1 or loss.is_complex()):
        raise ValueError(f"{name} has shape {tuple(loss.shape)} and dtype {loss.dtype}; one real value is needed")


def check_same_shapes(saved: Shapes, ours: Shapes) -> None:
    """Parameters of a saved state against those of this optimizer; names the first difference."""
    if len(saved) != len(ours):
        raise ValueError(f"state_dict has {len(saved)} parameter groups, this optimizer {len(ours)}")
    for number, (theirs, mine) in enumerate(zip(saved, ours, strict=True)):
        if len(theirs) != len(mine):
            raise ValueError(f"state_dict has {len(theirs)} parameters in group {number}, this optimizer {len(mine)}")
        for index, (their, my) in enumerate(zip(theirs, mine, strict=True)):
            if their != my:
                raise ValueError(
                    f"state_dict belongs to another model: parameter {index} of group {number} has shape "
                    f"{their} there and {my} here"
                )


def check_same_options(saved: list[dict[str, object]], optimizer: Optimizer) -> None:
    """Groups of a saved state against what a base optimizer reads in them: another one saved other options."""
    for number, group in enumerate(saved):
        if missing := {"rho_scale", *optimizer.defaults} - set(group):
            raise ValueError(
                f"state_dict lacks {', '.join(sorted(missing))} in parameter group {number}: it must be saved around "
                f"the same base_optimizer, here {type(optimizer).__name__}"
            )


def describe(group: dict[str, object], index: int) -> str:
    """A parameter by its name, where the optimizer was given names, or its position in the group."""
    names = group.get("param_names")
    shape = tuple(group["params"][index].shape)
    return f"parameter {names[index] if names else index} of shape {shape}"
