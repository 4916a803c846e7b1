"""The base optimizers whose update is part of the last sweep: SGD, Adam and AdamW of torch.

Their `param_groups` and `state`, with torch's names, are those of the base optimizer, so that state dicts are
interchangeable with the unfused step and with torch's own.
"""

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from asga.optim._lists import Lists, local

_BASES = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def reason_not_to_fuse(base: Optimizer) -> str | None:
    """Why the update of a base optimizer cannot be part of the sweep, or None if it can."""
    if type(base) not in _BASES:
        return f"the base optimizer is {type(base).__name__}; SGD, Adam and AdamW of torch.optim are fused"
    for group in base.param_groups:
        if group.get("dampening", 0) != 0:
            return "dampening is not zero"
        if group.get("amsgrad"):
            return "amsgrad is True"
        if group.get("differentiable"):
            return "differentiable is True"
        if any(isinstance(beta, Tensor) and beta.device.type != "cpu" for beta in group.get("betas", ())):
            return "betas are tensors on a device"
    if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return "the base optimizer has hooks on its step"
    return None


def update(
    base: Optimizer, lists: Lists, backups: list[Tensor], first_grads: list[Tensor], coefficients: Tensor
) -> None:
    """B3: restore, combine and step, in one sweep; see `asga.ops.sam_reference`."""
    device, group = lists.device, lists.group
    common = (lists.params, backups, first_grads, lists.grads)
    rate, lr = _learning_rate(group["lr"], device)
    coefficients = coefficients.to(device)
    if type(base) is torch.optim.SGD:
        momentum = float(group["momentum"])
        buffers = [_moment(base, owner, "momentum_buffer") for owner in lists.owners] if momentum else []
        options = (rate, lr, momentum, float(group["weight_decay"]), bool(group["nesterov"]))
        torch.ops.asga.sam_sgd.default(*common, buffers, coefficients, *options)
        torch.autograd.graph.increment_version(lists.params)
        return
    first = [_moment(base, owner, "exp_avg") for owner in lists.owners]
    second = [_moment(base, owner, "exp_avg_sq") for owner in lists.owners]
    steps = [_step_count(base, owner, device) for owner in lists.owners]
    decoupled = group.get("decoupled_weight_decay", type(base) is torch.optim.AdamW)
    options = (*map(float, group["betas"]), float(group["eps"]), float(group["weight_decay"]), bool(decoupled))
    torch.ops.asga.sam_adam.default(*common, first, second, steps, coefficients, rate, lr, *options)
    torch.autograd.graph.increment_version(lists.params)


def _learning_rate(lr: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """As a tensor where it is one on the device, else as a number."""
    if not isinstance(lr, Tensor):
        return None, float(lr)
    if lr.device.type == "cpu" and device.type != "cpu":
        return None, lr.item()
    return lr.detach().to(device, torch.float64).reshape(()), 0.0


def _moment(base: Optimizer, owner: Tensor, name: str) -> Tensor:
    """A moving average on this rank; zero at first, as a DTensor where the parameter is one."""
    state = base.state[owner]
    value = state.get(name)
    if value is None:
        value = state[name] = torch.zeros_like(owner, memory_format=torch.preserve_format)
    return local(value)


def _step_count(base: Optimizer, owner: Tensor, device: torch.device) -> Tensor:
    """The number of steps as the sweep counts it, wherever and however torch kept it."""
    state = base.state[owner]
    step = state.get("step")
    if step is None:
        step = torch.zeros((), dtype=torch.float32, device=device)
    elif not isinstance(step, Tensor):
        step = torch.tensor(float(step), device=device)
    state["step"] = step = step.to(device, torch.float32)
    return step
