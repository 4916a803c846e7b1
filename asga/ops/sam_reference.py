"""The fused ASGA step in plain torch: the definition that every other backend is tested against.

One function for each sweep over the parameters (A1, A3, B1, B3) and each block of scalars (A2; B2 and B4 in one).
`asga.ops.sam_library` says what the lists hold. The elementwise arithmetic below is the contract, operation by
operation: a kernel must write the same bits where it is given the same scalars. Sums may differ by the order of their
additions.

The gradients may carry a factor S (`grad_scale`, of a GradScaler) through both passes: products then carry S^2, and
`step` and the coefficients come out divided by S, ready to be multiplied by what the lists hold.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from asga.ops.sam_library import COUNTS, VARIANTS


def sam_norm(params: Sequence[Tensor], grads: Sequence[Tensor], rho_scales: Sequence[float], adaptive: bool) -> Tensor:
    """A1: ``q0 = ||T g||^2`` with T = `rho_scales`, times ``|theta|`` if adaptive.

    Parameters are read only if adaptive, gradients only where `rho_scales` is not zero.

    Returns:
        0-dim float64.
    """
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device)
    for param, grad, rho_scale in zip(params, grads, rho_scales, strict=True):
        if rho_scale > 0:
            scaled = _in_metric(param, _wide(grad, param), adaptive)
            total = total + rho_scale**2 * _dot(scaled, scaled)
    return total


def sam_ascent_step(q0: Tensor, rho: Tensor, grad_scale: Tensor | None, shift: float, relative: bool) -> Tensor:
    """A2: ``s = (1 - shift) rho / sqrt(q0)`` or ``s = rho / sqrt(q0) - shift / S``; 0 if q0 is 0 or not finite.

    Args:
        q0: What `sam_norm` returned, 0-dim float64.
        rho: The radius, 0-dim float64.
        grad_scale: S, 0-dim float64; None is one.
        shift: alpha.
        relative: Whether it is a share of the step.

    Returns:
        0-dim float64.
    """
    step = rho / torch.sqrt(q0)
    if relative:
        step = step * (1.0 - shift)
    elif grad_scale is None:
        step = step - shift
    else:
        step = step - shift / grad_scale
    return torch.where(torch.isfinite(q0) & (q0 > 0), step, 0.0)


def sam_perturb(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    step: Tensor,
    rho_scales: Sequence[float],
    adaptive: bool,
) -> None:
    """A3: ``backup <- theta; theta <- theta + s T^2 g; first_grad <- g``.

    Theta stays where s T^2 is 0, whatever g holds. `first_grads` is empty where g is kept without a copy. Where
    `rho_scales` is zero, parameter and backup are left alone and only the gradient is copied.
    """
    for index, (param, backup, grad, rho_scale) in enumerate(zip(params, backups, grads, rho_scales, strict=True)):
        if first_grads:
            first_grads[index].copy_(grad)
        if rho_scale == 0:
            continue
        theta, direction = _wide(param, param), _wide(grad, param)
        if adaptive:
            direction = theta * theta * direction
        size = (step * rho_scale**2).to(theta.dtype)
        backup.copy_(param)
        # 0 * Inf is NaN: without the select a bad pass 1 would run pass 2 on NaN weights.
        param.copy_(torch.where(size == 0, theta, theta + size * direction))


def sam_dots(
    params: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho_scales: Sequence[float],
    adaptive: bool,
) -> Tensor:
    """B1: the dot products of g0 and g1, the last one in the metric of the perturbation.

    Args:
        params: The weights at theta, that is the backups; read only if adaptive.
        first_grads: g0. Empty: only ``<g1, g1>`` is wanted, and the other three are zero.
        grads: g1.
        rho_scales: T; where it is zero the tensor counts only in the first three.
        adaptive: Whether T has the factor ``|theta|``.

    Returns:
        ``[<g0, g0>, <g0, g1>, <g1, g1>, <T g0, T g1>]``, float64.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=grads[0].device).unbind()
    for index, (param, grad, rho_scale) in enumerate(zip(params, grads, rho_scales, strict=True)):
        second = _wide(grad, param)
        terms = [0.0, 0.0, _dot(second, second), 0.0]
        if first_grads and first_grads[index].numel() > 0:
            first = _wide(first_grads[index], param)
            terms[0], terms[1] = _dot(first, first), _dot(first, second)
            if rho_scale > 0:
                metric = terms[1]
                if adaptive:
                    metric = _dot(_in_metric(param, first, True), _in_metric(param, second, True))
                terms[3] = rho_scale**2 * metric
        totals = [total + term for total, term in zip(totals, terms, strict=True)]
    return torch.stack(list(totals))


def sam_coefficients(
    q0: Tensor,
    step: Tensor,
    dots: Tensor | None,
    losses: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rho: Tensor,
    counts: Tensor,
    variant: int,
    weight: float,
    max_norm: float | None,
    follow_gap: bool,
    rho_min: float,
    rho_max: float,
) -> Tensor:
    """B2 and B4: how to combine the gradients, whether to step at all, and the radius of the next step.

    Args:
        q0: What `sam_norm` returned, 0-dim float64.
        step: What `sam_ascent_step` returned, 0-dim float64.
        dots: What `sam_dots` returned, ``[4]`` float64; None (variants sam and aligned without `max_norm`): unknown.
        losses: The losses that are known, ``[0]``, ``[1]`` or ``[2]`` float64; two are those of pass 1 and pass 2.
        grad_scale: S, 0-dim float64; None is one.
        found_inf: 0-dim float64, not zero where a GradScaler found an infinity; or None.
        rho: The radius, 0-dim float64; moves to ``clamp(log(1 + max(h, 0)), rho_min, rho_max)`` if `follow_gap`, the
            step is valid and h is finite.
        counts: int64 ``[5]``, see `COUNTS`.
        variant: Index in `VARIANTS`.
        weight: GSAM's alpha, unused otherwise.
        max_norm: Clip the norm of ``d = c0 g0 + c1 g1``, or None.
        follow_gap: Whether the radius moves.
        rho_min: Smallest radius.
        rho_max: Largest radius.

    Returns:
        ``[c0, c1, valid, h]`` float64. `valid` is 1, or 0 where q0, a dot product or a loss is not finite or
        `found_inf` is set: then nothing but the restored weights may be written. `h` is the difference of the two
        losses or, without them, ``s (<T g0, T g0> + <T g0, T g1>) / 2`` (NaN where the products are unknown).
    """
    one = torch.ones_like(q0)
    inverse = one if grad_scale is None else 1.0 / grad_scale
    known = [q0.reshape(1), losses] if dots is None else [q0.reshape(1), losses, dots]
    valid = torch.isfinite(torch.cat(known)).all()
    if found_inf is not None:
        valid = valid & (found_inf == 0)

    if losses.numel() == 2:
        gap = losses[1] - losses[0]
    elif dots is not None:
        gap = step * (q0 + dots[3]) / 2.0 * inverse
    else:
        gap = torch.full_like(q0, torch.nan)

    c0, c1 = _combination(VARIANTS[variant], dots, weight, one)
    if max_norm is not None:
        # ||d||^2 from the dot products: no further sweep. Rounding may leave it below zero when d cancels.
        # 1e-6 as in torch.nn.utils.clip_grad_norm_, whose result this reproduces.
        g0_g0, g0_g1, g1_g1, _ = dots.unbind()
        squared = c0 * c0 * g0_g0 + 2.0 * c0 * c1 * g0_g1 + c1 * c1 * g1_g1
        factor = (max_norm / (torch.sqrt(squared.clamp(min=0.0)) * inverse + 1e-6)).clamp(max=1.0)
        c0, c1 = c0 * factor, c1 * factor

    if follow_gap:
        target = torch.log1p(gap.clamp(min=0.0))
        moves = valid & torch.isfinite(gap)
        rho.copy_(torch.where(moves, target.clamp(rho_min, rho_max), rho))
        radius_counts = [moves, moves & (target <= rho_min), moves & (target >= rho_max)]
    else:
        radius_counts = [torch.zeros_like(valid)] * 3
    counts.add_(torch.stack([*radius_counts, torch.ones_like(valid), ~valid]))
    assert counts.numel() == len(COUNTS)
    return torch.stack([c0 * inverse, c1 * inverse, valid.to(q0.dtype), gap])


def sam_combine(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    coefficients: Tensor,
) -> None:
    """B3 for any base optimizer: ``theta <- backup; g1 <- c0 g0 + c1 g1``, the latter only if valid."""
    valid = coefficients[2] != 0
    for index, (param, backup, grad) in enumerate(zip(params, backups, grads, strict=True)):
        _write_if(valid, grad, _combined(first_grads, grad, index, coefficients, param))
        param.copy_(backup)


def sam_sgd(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    coefficients: Tensor,
    lr_tensor: Tensor | None,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """B3 with `torch.optim.SGD`: restore from the backup, combine, decay, update; if not valid, restore only.

    Gradients are not written. `momentum_buffers` is empty without momentum; a new one is zero. `lr_tensor`, 0-dim
    float64, takes the place of `lr` where it is given.
    """
    valid = coefficients[2] != 0
    for index, (param, backup, grad) in enumerate(zip(params, backups, grads, strict=True)):
        theta = _wide(backup, param)
        d = _combined(first_grads, grad, index, coefficients, param)
        if weight_decay != 0:
            d = d + weight_decay * theta
        if momentum_buffers:
            buffer = momentum * _wide(momentum_buffers[index], param) + d
            d = d + momentum * buffer if nesterov else buffer
            _write_if(valid, momentum_buffers[index], buffer)
        move = _rate(lr_tensor, lr, 1.0, theta) * d
        param.copy_(backup)
        _write_if(valid, param, _subtract(theta, move))


def sam_adam(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    coefficients: Tensor,
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """B3 with `torch.optim.Adam`, or AdamW if `decoupled`: as `sam_sgd`, with both moments and the step counts.

    `steps` are 0-dim float32 tensors on the device, the number of steps before this one.
    """
    valid = coefficients[2] != 0
    for index, (param, backup, grad) in enumerate(zip(params, backups, grads, strict=True)):
        backup_values = _wide(backup, param)
        theta = backup_values
        d = _combined(first_grads, grad, index, coefficients, param)
        if weight_decay != 0 and decoupled:
            theta = theta * (1.0 - _rate(lr_tensor, lr, weight_decay)).to(theta.dtype)
        elif weight_decay != 0:
            d = d + weight_decay * theta
        first, second = _wide(exp_avgs[index], param), _wide(exp_avg_sqs[index], param)
        first = first + (1.0 - beta1) * (d - first)
        second = beta2 * second + ((1.0 - beta2) * d) * d
        count = steps[index].double() + 1.0
        size = (_rate(lr_tensor, lr, 1.0) / (1.0 - beta1**count)).to(theta.dtype)
        root = torch.sqrt(1.0 - beta2**count).to(theta.dtype)
        move = (size * first) / (_square_root(second) / root + eps)
        param.copy_(backup)
        _write_if(valid, param, _subtract(theta, move))
        _write_if(valid, exp_avgs[index], first)
        _write_if(valid, exp_avg_sqs[index], second)
        steps[index].add_(valid)


def _combination(variant: str, dots: Tensor | None, weight: float, one: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (c0, c1) of a variant before clipping."""
    if variant == "sam":
        return torch.zeros_like(one), one
    if variant == "aligned":
        return one / 2, one / 2
    # k g1 is the component of g0 along g1; a zero g1 has none.
    k = torch.where(dots[2] > 0, dots[1] / dots[2], 0.0)
    if variant == "gsam":
        return -weight * one, 1.0 + weight * k
    return one / 2, (1.0 - k.clamp(max=0.0)) / 2


def _combined(first_grads: Sequence[Tensor], grad: Tensor, index: int, coefficients: Tensor, param: Tensor) -> Tensor:
    """``c0 g0 + c1 g1`` in the dtype of the arithmetic."""
    second = _wide(grad, param)
    c0, c1 = coefficients[0].to(second.dtype), coefficients[1].to(second.dtype)
    if not first_grads or first_grads[index].numel() == 0:
        return c1 * second
    return c0 * _wide(first_grads[index], param) + c1 * second


def _square_root(x: Tensor) -> Tensor:
    """Rounded correctly in float32, by way of float64: torch's own on a CPU often misses by an ulp."""
    return torch.sqrt(x.double()).to(x.dtype)


def _subtract(theta: Tensor, move: Tensor) -> Tensor:
    """``theta - move``, and theta to the bit where the move is zero: -0.0 - (-0.0) would be 0.0."""
    return torch.where(move == 0, theta, theta - move)


def _write_if(valid: Tensor, target: Tensor, values: Tensor) -> None:
    target.copy_(torch.where(valid, values.to(target.dtype), target))


def _rate(lr_tensor: Tensor | None, lr: float, factor: float, like: Tensor | None = None) -> Tensor | float:
    """The learning rate times `factor`, multiplied in float64; as a tensor of the dtype of `like`, or float64."""
    rate = lr * factor if lr_tensor is None else lr_tensor * factor
    if like is None:
        return torch.as_tensor(rate, dtype=torch.float64)
    return rate if lr_tensor is None else rate.to(like.dtype)


def _in_metric(param: Tensor, grad: Tensor, adaptive: bool) -> Tensor:
    """``theta * g`` for ASAM: the sign of theta cancels in every product of two of these."""
    return _wide(param, param) * grad if adaptive else grad


def _wide(tensor: Tensor, param: Tensor) -> Tensor:
    """`tensor` in the dtype of the arithmetic on `param`."""
    return tensor.to(torch.float64 if param.dtype == torch.float64 else torch.float32)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Sum of products: rounded to their dtype, added in float64."""
    return (left * right).sum(dtype=torch.float64)
