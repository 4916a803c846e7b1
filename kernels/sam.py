"""The fused ASGA step: sums, perturbation and updates over lists of tensors, and the scalars in between.

One function for each operator of `asga.ops.sam_library`, with its arguments; `asga.ops.sam_reference` defines the
arithmetic and says what each computes. Every sweep is one launch for all tensors, sums have a second one that adds up a
partial sum of each chunk in float64, always in the same order. `asga.kernels.tensor_lists` says how kernels find their
tensors, and what that costs.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from asga.kernels.quant_math import divide
from asga.kernels.tensor_lists import (
    TILE,
    Operand,
    TensorLists,
    as_double,
    bits_of,
    is_there,
    part_of,
    pointer_of,
    pointer_table,
)

# Steps that one program counts.
_STEPS = 128


def sam_norm(params: Sequence[Tensor], grads: Sequence[Tensor], rho_scales: Sequence[float], adaptive: bool) -> Tensor:
    """A1: ``q0 = ||T g||^2``, 0-dim float64."""
    _check_scales(rho_scales, params)
    operands = [
        Operand("grads", grads, is_gradient=True),
        Operand("params", params if adaptive else (), optional=True),
    ]
    lists = TensorLists(params, operands, [scale or None for scale in rho_scales])
    return _add_up(lists, 1, grads[0], _norm_kernel, ADAPTIVE=adaptive).reshape(())


def sam_ascent_step(q0: Tensor, rho: Tensor, grad_scale: Tensor | None, shift: float, relative: bool) -> Tensor:
    """A2: the length of the ascent step, 0-dim float64."""
    result = torch.empty_like(q0)
    with torch.cuda.device_of(q0):
        _ascent_step_kernel[(1,)](result, q0, rho, grad_scale, bits_of(shift), RELATIVE=relative, **_ONE_WARP)
    return result


def sam_perturb(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    step: Tensor,
    rho_scales: Sequence[float],
    adaptive: bool,
) -> None:
    """A3: ``backup <- theta; theta <- theta + s T^2 g; first_grad <- g``."""
    _check_scales(rho_scales, params)
    _check_scalars("step", step)
    operands = _up_to_backups(params, backups, first_grads, grads, ("params", "backups", "first_grads"))
    scales = rho_scales if first_grads else [scale or None for scale in rho_scales]
    TensorLists(params, operands, scales).launch(_perturb_kernel, step, ADAPTIVE=adaptive, KEEPS=len(first_grads) > 0)


def sam_dots(
    params: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho_scales: Sequence[float],
    adaptive: bool,
) -> Tensor:
    """B1: ``[<g0, g0>, <g0, g1>, <g1, g1>, <T g0, T g1>]``, float64."""
    _check_scales(rho_scales, params)
    in_metric = adaptive and len(first_grads) > 0
    operands = [
        Operand("grads", grads, is_gradient=True),
        Operand("params", params if in_metric else (), optional=True),
        Operand("first_grads", first_grads, optional=True, is_gradient=True),
    ]
    lists = TensorLists(params, operands, rho_scales)
    return _add_up(lists, 4, grads[0], _dots_kernel, ADAPTIVE=in_metric, FIRST=len(first_grads) > 0)


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
    """B2 and B4: ``[c0, c1, valid, h]`` float64; moves `rho` and `counts`."""
    if dots is None and (variant > 1 or max_norm is not None):
        raise RuntimeError("dots is None, but the variant or max_norm needs the dot products")
    result = q0.new_empty(4)
    numbers = (weight, max_norm or 0.0, rho_min, rho_max)
    with torch.cuda.device_of(q0):
        _coefficients_kernel[(1,)](
            *(result, q0, step, dots, losses, grad_scale, found_inf, rho, counts),
            *map(bits_of, numbers),
            LOSSES=losses.numel(),
            VARIANT=variant,
            CLIPS=max_norm is not None,
            FOLLOW_GAP=follow_gap,
            **_ONE_WARP,
        )
    return result


def sam_combine(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    coefficients: Tensor,
) -> None:
    """B3 for any base optimizer: ``theta <- backup; g1 <- c0 g0 + c1 g1``, the latter only if valid."""
    _check_scalars("coefficients", coefficients, 4)
    operands = _up_to_backups(params, backups, first_grads, grads, ("params", "grads"))
    TensorLists(params, operands).launch(_combine_kernel, coefficients, FIRST=len(first_grads) > 0)


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
    """B3 with `torch.optim.SGD`."""
    _check_scalars("coefficients", coefficients, 4)
    operands = _up_to_backups(params, backups, first_grads, grads, ("params",))
    operands.append(Operand("momentum_buffers", momentum_buffers, written=True, optional=True))
    TensorLists(params, operands).launch(
        _sgd_kernel,
        *(coefficients, lr_tensor, bits_of(lr), bits_of(momentum), bits_of(weight_decay)),
        FIRST=len(first_grads) > 0,
        MOMENTUM=len(momentum_buffers) > 0,
        NESTEROV=nesterov,
        DECAYS=weight_decay != 0,
    )


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
    """B3 with `torch.optim.Adam`, or AdamW if `decoupled`."""
    _check_scalars("coefficients", coefficients, 4)
    if len(steps) != len(params):
        raise RuntimeError(f"steps has {len(steps)} tensors, but params {len(params)}")
    if any(step.dtype != torch.float32 or step.numel() != 1 or step.device != coefficients.device for step in steps):
        raise RuntimeError("steps must hold float32 tensors on the device of params with one element")
    operands = _up_to_backups(params, backups, first_grads, grads, ("params",))
    operands.append(Operand("exp_avgs", exp_avgs, written=True))
    operands.append(Operand("exp_avg_sqs", exp_avg_sqs, written=True))
    lists = TensorLists(params, operands)
    # Before the sweep: there, one program would count while others still read. Those that take part come first.
    part = set(lists.entries)
    ordered = [steps[i] for i in lists.entries] + [step for i, step in enumerate(steps) if i not in part]
    sizes = coefficients.new_empty(2, len(steps))
    rate = (lr_tensor, bits_of(lr))
    with torch.cuda.device_of(coefficients):
        _adam_sizes_kernel[(triton.cdiv(len(steps), _STEPS),)](
            *(sizes, pointer_table(ordered), coefficients, *rate, bits_of(beta1), bits_of(beta2), len(steps)),
            STEPS=_STEPS,
            **_ONE_WARP,
        )
    lists.launch(
        _adam_kernel,
        *(sizes, len(steps), coefficients, *rate),
        *map(bits_of, (beta1, beta2, eps, weight_decay)),
        FIRST=len(first_grads) > 0,
        DECAYS=weight_decay != 0,
        DECOUPLED=decoupled,
    )


_ONE_WARP = dict(num_warps=1, enable_fp_fusion=False)


def _up_to_backups(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    written: Sequence[str],
) -> list[Operand]:
    """The first four operands, in the order of the numbers below."""
    return [
        Operand("grads", grads, "grads" in written, is_gradient=True),
        Operand("params", params, "params" in written),
        Operand("first_grads", first_grads, "first_grads" in written, optional=True, is_gradient=True),
        Operand("backups", backups, "backups" in written),
    ]


def _add_up(lists: TensorLists, terms: int, like: Tensor, kernel: object, **options: object) -> Tensor:
    """Sums over all chunks, float64 ``[terms]``."""
    partials = like.new_empty(terms, lists.programs, dtype=torch.float64)
    totals = like.new_empty(terms, dtype=torch.float64)
    lists.launch(kernel, partials, lists.programs, **options)
    with torch.cuda.device_of(like):
        _sam_finish_kernel[(terms,)](partials, totals, lists.programs, BLOCK=TILE, num_warps=4)
    return totals


def _check_scales(rho_scales: Sequence[float], params: Sequence[Tensor]) -> None:
    if len(rho_scales) != len(params):
        raise RuntimeError(f"rho_scales has {len(rho_scales)} entries, but params {len(params)}")


def _check_scalars(name: str, tensor: Tensor, count: int = 1) -> None:
    if tensor.dtype != torch.float64 or tensor.numel() != count or not tensor.is_contiguous():
        raise RuntimeError(f"{name} must be a float64 tensor with {count} element(s), got {tensor.dtype}")


# The numbers of the operands.
_GRAD = tl.constexpr(0)
_THETA = tl.constexpr(1)
_FIRST = tl.constexpr(2)
_BACKUP = tl.constexpr(3)
_MOMENT = tl.constexpr(4)
_SQUARE = tl.constexpr(5)


@triton.jit(do_not_specialize=["tensors", "slots"])
def _norm_kernel(
    table_ptr,
    chunks_ptr,
    tensors,
    partials_ptr,  # [slots] float64
    slots,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    OPERANDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):
    entry, start, count, rho_scale = part_of(table_ptr, chunks_ptr, tensors, OPERANDS, CHUNK)
    g_ptr = pointer_of(table_ptr, _GRAD, tensors, entry, start, GRAD_DTYPE, ALIGNED)
    theta_ptr = g_ptr
    if ADAPTIVE:
        theta_ptr = pointer_of(table_ptr, _THETA, tensors, entry, start, DTYPE, ALIGNED)
    offsets = tl.arange(0, TILE)
    total = tl.zeros([TILE], COMPUTE)
    for tile in range(0, count // TILE):
        total += _square(g_ptr, theta_ptr, tile * TILE + offsets, None, COMPUTE, ADAPTIVE)
    last = count // TILE * TILE
    if last < count:
        total += _square(g_ptr, theta_ptr, last + offsets, last + offsets < count, COMPUTE, ADAPTIVE)
    sum = tl.sum(total, axis=0).to(tl.float64) * (rho_scale * rho_scale)
    tl.store(partials_ptr + tl.program_id(0), sum)


@triton.jit
def _square(g_ptr, theta_ptr, offsets, mask, COMPUTE: tl.constexpr, ADAPTIVE: tl.constexpr):
    g = _read(g_ptr, offsets, mask, COMPUTE)
    if ADAPTIVE:
        g = _read(theta_ptr, offsets, mask, COMPUTE) * g
    return g * g


@triton.jit(do_not_specialize=["tensors"])
def _perturb_kernel(
    table_ptr,
    chunks_ptr,
    tensors,
    step_ptr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    OPERANDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    KEEPS: tl.constexpr,
):
    entry, start, count, rho_scale = part_of(table_ptr, chunks_ptr, tensors, OPERANDS, CHUNK)
    g_ptr = pointer_of(table_ptr, _GRAD, tensors, entry, start, GRAD_DTYPE, ALIGNED)
    theta_ptr = pointer_of(table_ptr, _THETA, tensors, entry, start, DTYPE, ALIGNED)
    first_ptr = pointer_of(table_ptr, _FIRST, tensors, entry, start, GRAD_DTYPE, ALIGNED)
    backup_ptr = pointer_of(table_ptr, _BACKUP, tensors, entry, start, DTYPE, ALIGNED)
    keeps = False
    if KEEPS:
        keeps = is_there(table_ptr, _FIRST, tensors, entry)
    perturbed = rho_scale != 0
    size = (tl.load(step_ptr) * (rho_scale * rho_scale)).to(COMPUTE)
    offsets = tl.arange(0, TILE)
    for tile in range(0, count // TILE):
        _perturb(
            *(g_ptr, theta_ptr, first_ptr, backup_ptr, tile * TILE + offsets, None, size, perturbed, keeps),
            *(DTYPE, ADAPTIVE),
        )
    last = count // TILE * TILE
    if last < count:
        _perturb(
            *(g_ptr, theta_ptr, first_ptr, backup_ptr, last + offsets, last + offsets < count, size, perturbed, keeps),
            *(DTYPE, ADAPTIVE),
        )


@triton.jit
def _perturb(
    g_ptr,
    theta_ptr,
    first_ptr,
    backup_ptr,
    offsets,
    mask,
    size,
    perturbed,
    keeps,
    DTYPE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):
    g = tl.load(g_ptr + offsets, mask)
    if keeps:
        tl.store(first_ptr + offsets, g, mask)
    if perturbed:
        kept = tl.load(theta_ptr + offsets, mask)
        theta = kept.to(size.dtype)
        direction = g.to(size.dtype)
        if ADAPTIVE:
            direction = (theta * theta) * direction
        moved = tl.where(size == 0, theta, theta + size * direction)
        tl.store(backup_ptr + offsets, kept, mask)
        tl.store(theta_ptr + offsets, _narrow(moved, DTYPE), mask)


@triton.jit(do_not_specialize=["tensors", "slots"])
def _dots_kernel(
    table_ptr,
    chunks_ptr,
    tensors,
    partials_ptr,  # [4, slots] float64
    slots,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    OPERANDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    FIRST: tl.constexpr,
):
    entry, start, count, rho_scale = part_of(table_ptr, chunks_ptr, tensors, OPERANDS, CHUNK)
    g1_ptr = pointer_of(table_ptr, _GRAD, tensors, entry, start, GRAD_DTYPE, ALIGNED)
    g0_ptr, theta_ptr = g1_ptr, g1_ptr
    there = False
    if FIRST:
        g0_ptr = pointer_of(table_ptr, _FIRST, tensors, entry, start, GRAD_DTYPE, ALIGNED)
        there = is_there(table_ptr, _FIRST, tensors, entry)
    if ADAPTIVE:
        theta_ptr = pointer_of(table_ptr, _THETA, tensors, entry, start, DTYPE, ALIGNED)
    offsets = tl.arange(0, TILE)
    zeros = tl.zeros([TILE], COMPUTE)
    g0_g0, g0_g1, g1_g1, metric = zeros, zeros, zeros, zeros
    for tile in range(0, count // TILE):
        at = tile * TILE + offsets
        g1 = _read(g1_ptr, at, None, COMPUTE)
        g1_g1 += g1 * g1
        if there:
            g0 = _read(g0_ptr, at, None, COMPUTE)
            g0_g0 += g0 * g0
            g0_g1 += g0 * g1
            if ADAPTIVE:
                theta = _read(theta_ptr, at, None, COMPUTE)
                metric += (theta * g0) * (theta * g1)
    last = count // TILE * TILE
    if last < count:
        at = last + offsets
        mask = at < count
        g1 = _read(g1_ptr, at, mask, COMPUTE)
        g1_g1 += g1 * g1
        if there:
            g0 = _read(g0_ptr, at, mask, COMPUTE)
            g0_g0 += g0 * g0
            g0_g1 += g0 * g1
            if ADAPTIVE:
                theta = _read(theta_ptr, at, mask, COMPUTE)
                metric += (theta * g0) * (theta * g1)
    if not ADAPTIVE:
        metric = g0_g1
    slot = partials_ptr + tl.program_id(0)
    slots = slots.to(tl.int64)
    tl.store(slot, tl.sum(g0_g0, axis=0).to(tl.float64))
    tl.store(slot + slots, tl.sum(g0_g1, axis=0).to(tl.float64))
    tl.store(slot + 2 * slots, tl.sum(g1_g1, axis=0).to(tl.float64))
    square = rho_scale * rho_scale
    # 0 * Inf would be NaN.
    tl.store(slot + 3 * slots, tl.where(square == 0, 0.0, square * tl.sum(metric, axis=0).to(tl.float64)))


@triton.jit(do_not_specialize=["slots"])
def _sam_finish_kernel(partials_ptr, totals_ptr, slots, BLOCK: tl.constexpr):
    term = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, slots, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + term.to(tl.int64) * slots + slot, slot < slots, other=0.0)
    tl.store(totals_ptr + term, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["tensors"])
def _combine_kernel(
    table_ptr,
    chunks_ptr,
    tensors,
    coefficients_ptr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    OPERANDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    FIRST: tl.constexpr,
):
    entry, start, count, _ = part_of(table_ptr, chunks_ptr, tensors, OPERANDS, CHUNK)
    g_ptr = pointer_of(table_ptr, _GRAD, tensors, entry, start, GRAD_DTYPE, ALIGNED)
    theta_ptr = pointer_of(table_ptr, _THETA, tensors, entry, start, DTYPE, ALIGNED)
    first_ptr = pointer_of(table_ptr, _FIRST, tensors, entry, start, GRAD_DTYPE, ALIGNED)
    backup_ptr = pointer_of(table_ptr, _BACKUP, tensors, entry, start, DTYPE, ALIGNED)
    there = False
    if FIRST:
        there = is_there(table_ptr, _FIRST, tensors, entry)
    c0, c1, valid = _combination(coefficients_ptr, COMPUTE)
    offsets = tl.arange(0, TILE)
    for tile in range(0, tl.cdiv(count, TILE)):
        at = tile * TILE + offsets
        if (tile + 1) * TILE <= count:
            tl.store(theta_ptr + at, tl.load(backup_ptr + at))
            if valid:
                d = _combined(g_ptr, first_ptr, at, None, c0, c1, there)
                tl.store(g_ptr + at, _narrow(d, GRAD_DTYPE))
        else:
            mask = at < count
            tl.store(theta_ptr + at, tl.load(backup_ptr + at, mask), mask)
            if valid:
                d = _combined(g_ptr, first_ptr, at, mask, c0, c1, there)
                tl.store(g_ptr + at, _narrow(d, GRAD_DTYPE), mask)


@triton.jit(do_not_specialize=["tensors", "lr", "momentum", "weight_decay"])
def _sgd_kernel(
    table_ptr,
    chunks_ptr,
    tensors,
    coefficients_ptr,
    lr_ptr,
    lr,
    momentum,
    weight_decay,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    OPERANDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    FIRST: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAYS: tl.constexpr,
):
    entry, start, count, _ = part_of(table_ptr, chunks_ptr, tensors, OPERANDS, CHUNK)
    g_ptr = pointer_of(table_ptr, _GRAD, tensors, entry, start, GRAD_DTYPE, ALIGNED)
    theta_ptr = pointer_of(table_ptr, _THETA, tensors, entry, start, DTYPE, ALIGNED)
    first_ptr = pointer_of(table_ptr, _FIRST, tensors, entry, start, GRAD_DTYPE, ALIGNED)
    backup_ptr = pointer_of(table_ptr, _BACKUP, tensors, entry, start, DTYPE, ALIGNED)
    moment_ptr = pointer_of(table_ptr, _MOMENT, tensors, entry, start, DTYPE, ALIGNED)
    there = False
    if FIRST:
        there = is_there(table_ptr, _FIRST, tensors, entry)
    c0, c1, valid = _combination(coefficients_ptr, COMPUTE)
    rate = _rate(lr_ptr, lr).to(COMPUTE)
    momentum = as_double(momentum).to(COMPUTE)
    weight_decay = as_double(weight_decay).to(COMPUTE)
    offsets = tl.arange(0, TILE)
    for tile in range(0, tl.cdiv(count, TILE)):
        at = tile * TILE + offsets
        if (tile + 1) * TILE <= count:
            _sgd(
                *(g_ptr, theta_ptr, first_ptr, backup_ptr, moment_ptr, at, None),
                *(c0, c1, valid, there, rate, momentum, weight_decay, DTYPE, MOMENTUM, NESTEROV, DECAYS),
            )
        else:
            _sgd(
                *(g_ptr, theta_ptr, first_ptr, backup_ptr, moment_ptr, at, at < count),
                *(c0, c1, valid, there, rate, momentum, weight_decay, DTYPE, MOMENTUM, NESTEROV, DECAYS),
            )


@triton.jit
def _sgd(
    g_ptr,
    theta_ptr,
    first_ptr,
    backup_ptr,
    moment_ptr,
    at,
    mask,
    c0,
    c1,
    valid,
    there,
    rate,
    momentum,
    weight_decay,
    DTYPE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAYS: tl.constexpr,
):
    kept = tl.load(backup_ptr + at, mask)
    if valid:
        theta = kept.to(c0.dtype)
        d = _combined(g_ptr, first_ptr, at, mask, c0, c1, there)
        if DECAYS:
            d = d + weight_decay * theta
        if MOMENTUM:
            buffer = momentum * _read(moment_ptr, at, mask, c0.dtype) + d
            tl.store(moment_ptr + at, _narrow(buffer, DTYPE), mask)
            d = d + momentum * buffer if NESTEROV else buffer
        tl.store(theta_ptr + at, _narrow(_subtract(theta, rate * d), DTYPE), mask)
    else:
        tl.store(theta_ptr + at, kept, mask)


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "count"])
def _adam_sizes_kernel(
    sizes_ptr,  # [2, count] float64: lr / (1 - beta1^t), sqrt(1 - beta2^t)
    steps_ptr,  # [count] addresses of float32
    coefficients_ptr,
    lr_ptr,
    lr,
    beta1,
    beta2,
    count,
    STEPS: tl.constexpr,
):
    i = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    mask = i < count
    step_ptr = tl.load(steps_ptr + i, mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask, other=0.0)
    number = step.to(tl.int64) + 1
    size = _rate(lr_ptr, lr) / (1.0 - _power(as_double(beta1), number))
    tl.store(sizes_ptr + i, size, mask)
    tl.store(sizes_ptr + count + i, tl.sqrt(1.0 - _power(as_double(beta2), number)), mask)
    valid = tl.load(coefficients_ptr + 2) != 0.0
    tl.store(step_ptr, tl.where(valid, step + 1.0, step), mask)


@triton.jit
def _power(base, exponent):
    """A float64 to the power of positive integers below 2**25, which is as far as steps in float32 count."""
    power = tl.where(exponent > 0, 1.0, 1.0).to(tl.float64)
    factor = power * base
    for bit in tl.static_range(25):
        power = tl.where((exponent >> bit) & 1 != 0, power * factor, power)
        factor = factor * factor
    return power


@triton.jit(
    do_not_specialize=["tensors", "sizes_stride", "lr", "beta1", "beta2", "eps", "weight_decay"],
)
def _adam_kernel(
    table_ptr,
    chunks_ptr,
    tensors,
    sizes_ptr,
    sizes_stride,
    coefficients_ptr,
    lr_ptr,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    OPERANDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    FIRST: tl.constexpr,
    DECAYS: tl.constexpr,
    DECOUPLED: tl.constexpr,
):
    entry, start, count, _ = part_of(table_ptr, chunks_ptr, tensors, OPERANDS, CHUNK)
    g_ptr = pointer_of(table_ptr, _GRAD, tensors, entry, start, GRAD_DTYPE, ALIGNED)
    theta_ptr = pointer_of(table_ptr, _THETA, tensors, entry, start, DTYPE, ALIGNED)
    first_ptr = pointer_of(table_ptr, _FIRST, tensors, entry, start, GRAD_DTYPE, ALIGNED)
    backup_ptr = pointer_of(table_ptr, _BACKUP, tensors, entry, start, DTYPE, ALIGNED)
    moment_ptr = pointer_of(table_ptr, _MOMENT, tensors, entry, start, DTYPE, ALIGNED)
    square_ptr = pointer_of(table_ptr, _SQUARE, tensors, entry, start, DTYPE, ALIGNED)
    there = False
    if FIRST:
        there = is_there(table_ptr, _FIRST, tensors, entry)
    c0, c1, valid = _combination(coefficients_ptr, COMPUTE)
    size = tl.load(sizes_ptr + entry).to(COMPUTE)
    root = tl.load(sizes_ptr + sizes_stride + entry).to(COMPUTE)
    rest1 = (1.0 - as_double(beta1)).to(COMPUTE)
    rest2 = (1.0 - as_double(beta2)).to(COMPUTE)
    beta2 = as_double(beta2).to(COMPUTE)
    eps = as_double(eps).to(COMPUTE)
    shrink = (1.0 - _rate(lr_ptr, lr) * as_double(weight_decay)).to(COMPUTE)
    weight_decay = as_double(weight_decay).to(COMPUTE)
    offsets = tl.arange(0, TILE)
    for tile in range(0, tl.cdiv(count, TILE)):
        at = tile * TILE + offsets
        if (tile + 1) * TILE <= count:
            _adam(
                *(g_ptr, theta_ptr, first_ptr, backup_ptr, moment_ptr, square_ptr, at, None, c0, c1, valid, there),
                *(size, root, rest1, rest2, beta2, eps, weight_decay, shrink, DTYPE, DECAYS, DECOUPLED),
            )
        else:
            _adam(
                *(g_ptr, theta_ptr, first_ptr, backup_ptr, moment_ptr, square_ptr, at, at < count),
                *(c0, c1, valid, there),
                *(size, root, rest1, rest2, beta2, eps, weight_decay, shrink, DTYPE, DECAYS, DECOUPLED),
            )


@triton.jit
def _adam(
    g_ptr,
    theta_ptr,
    first_ptr,
    backup_ptr,
    moment_ptr,
    square_ptr,
    at,
    mask,
    c0,
    c1,
    valid,
    there,
    size,
    root,
    rest1,
    rest2,
    beta2,
    eps,
    weight_decay,
    shrink,
    DTYPE: tl.constexpr,
    DECAYS: tl.constexpr,
    DECOUPLED: tl.constexpr,
):
    kept = tl.load(backup_ptr + at, mask)
    if valid:
        theta = kept.to(c0.dtype)
        d = _combined(g_ptr, first_ptr, at, mask, c0, c1, there)
        if DECAYS:
            if DECOUPLED:
                theta = theta * shrink
            else:
                d = d + weight_decay * theta
        first = _read(moment_ptr, at, mask, c0.dtype)
        second = _read(square_ptr, at, mask, c0.dtype)
        first = first + rest1 * (d - first)
        second = beta2 * second + (rest2 * d) * d
        move = divide(size * first, divide(_square_root(second), root) + eps)
        tl.store(moment_ptr + at, _narrow(first, DTYPE), mask)
        tl.store(square_ptr + at, _narrow(second, DTYPE), mask)
        tl.store(theta_ptr + at, _narrow(_subtract(theta, move), DTYPE), mask)
    else:
        tl.store(theta_ptr + at, kept, mask)


@triton.jit(do_not_specialize=["shift"])
def _ascent_step_kernel(result_ptr, q0_ptr, rho_ptr, grad_scale_ptr, shift, RELATIVE: tl.constexpr):
    q = tl.load(q0_ptr)
    shift = as_double(shift)
    step = tl.load(rho_ptr) / tl.sqrt(q)
    if RELATIVE:
        step = step * (1.0 - shift)
    elif grad_scale_ptr is None:
        step = step - shift
    else:
        step = step - shift / tl.load(grad_scale_ptr)
    tl.store(result_ptr, tl.where(_is_finite(q) & (q > 0), step, 0.0))


@triton.jit(do_not_specialize=["weight", "max_norm", "rho_min", "rho_max"])
def _coefficients_kernel(
    result_ptr,  # [4]
    q0_ptr,
    step_ptr,
    dots_ptr,  # [4] or None
    losses_ptr,  # [LOSSES]
    grad_scale_ptr,
    found_inf_ptr,
    rho_ptr,
    counts_ptr,  # [5] int64
    weight,
    max_norm,
    rho_min,
    rho_max,
    LOSSES: tl.constexpr,
    VARIANT: tl.constexpr,  # number in asga.ops.sam_library.VARIANTS
    CLIPS: tl.constexpr,
    FOLLOW_GAP: tl.constexpr,
):
    q = tl.load(q0_ptr)
    zero, one = tl.full((), 0.0, tl.float64), tl.full((), 1.0, tl.float64)
    inverse = one
    if grad_scale_ptr is not None:
        inverse = 1.0 / tl.load(grad_scale_ptr)
    valid = _is_finite(q)
    if found_inf_ptr is not None:
        valid = valid & (tl.load(found_inf_ptr) == 0)
    for i in tl.static_range(LOSSES):
        valid = valid & _is_finite(tl.load(losses_ptr + i))

    gap = one * float("nan")
    g0_g0, g0_g1, g1_g1, k = zero, zero, zero, zero
    if dots_ptr is not None:
        g0_g0, g0_g1, g1_g1 = tl.load(dots_ptr), tl.load(dots_ptr + 1), tl.load(dots_ptr + 2)
        ascent = tl.load(dots_ptr + 3)
        valid = valid & _is_finite(g0_g0) & _is_finite(g0_g1) & _is_finite(g1_g1) & _is_finite(ascent)
        gap = tl.load(step_ptr) * (q + ascent) / 2.0 * inverse
        # k g1 is the component of g0 along g1; a zero g1 has none.
        k = tl.where(g1_g1 > 0, g0_g1 / g1_g1, 0.0)
    if LOSSES == 2:
        gap = tl.load(losses_ptr + 1) - tl.load(losses_ptr)

    c0, c1 = zero, one
    if VARIANT == 1:
        c0, c1 = one / 2, one / 2
    elif VARIANT == 2:
        c0, c1 = -as_double(weight), 1.0 + as_double(weight) * k
    elif VARIANT == 3:
        c0, c1 = one / 2, (1.0 - tl.where(k > 0, 0.0, k)) / 2
    if CLIPS:
        squared = c0 * c0 * g0_g0 + 2.0 * c0 * c1 * g0_g1 + c1 * c1 * g1_g1
        factor = as_double(max_norm) / (tl.sqrt(tl.where(squared < 0, 0.0, squared)) * inverse + 1e-6)
        factor = tl.where(factor < 1, factor, 1.0)
        c0, c1 = c0 * factor, c1 * factor

    if FOLLOW_GAP:
        moves = valid & _is_finite(gap)
        low, high = as_double(rho_min), as_double(rho_max)
        target = _log1p(tl.where(gap > 0, gap, 0.0))
        rho = tl.where(target < low, low, tl.where(target > high, high, target))
        tl.store(rho_ptr, tl.where(moves, rho, tl.load(rho_ptr)))
        _count(counts_ptr, moves)
        _count(counts_ptr + 1, moves & (target <= low))
        _count(counts_ptr + 2, moves & (target >= high))
    _count(counts_ptr + 3, valid | (valid == 0))
    _count(counts_ptr + 4, valid == 0)
    tl.store(result_ptr, c0 * inverse)
    tl.store(result_ptr + 1, c1 * inverse)
    tl.store(result_ptr + 2, tl.where(valid, 1.0, 0.0).to(tl.float64))
    tl.store(result_ptr + 3, gap)


@triton.jit
def _count(count_ptr, by):
    tl.store(count_ptr, tl.load(count_ptr) + by.to(tl.int64))


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 in float64, exact to a few ulp: the rounding of 1 + x is divided out."""
    u = 1.0 + x
    rounded = u - 1.0
    return tl.where(rounded == 0, x, tl.log(u) * (x / tl.where(rounded == 0, 1.0, rounded)))


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _rate(lr_ptr, lr):
    """The learning rate, float64: the tensor takes the place of the number."""
    if lr_ptr is None:
        return as_double(lr)
    else:
        return tl.load(lr_ptr)


@triton.jit
def _combination(coefficients_ptr, COMPUTE: tl.constexpr):
    """c0 and c1 in the dtype of the arithmetic, and whether anything but the restored weights may be written."""
    c0 = tl.load(coefficients_ptr).to(COMPUTE)
    c1 = tl.load(coefficients_ptr + 1).to(COMPUTE)
    return c0, c1, tl.load(coefficients_ptr + 2) != 0


@triton.jit
def _combined(g_ptr, first_ptr, at, mask, c0, c1, there):
    """d = c0 g0 + c1 g1; without a g0 the second term alone, whose -0.0 a sum with zero would lose."""
    d = c1 * _read(g_ptr, at, mask, c0.dtype)
    if there:
        d = c0 * _read(first_ptr, at, mask, c0.dtype) + d
    return d


@triton.jit
def _subtract(theta, move):
    """theta - move, and theta to the bit where the move is zero: -0.0 - (-0.0) would be 0.0."""
    return tl.where(move == 0, theta, theta - move)


@triton.jit
def _square_root(x):
    """Rounded correctly."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _read(ptr, at, mask, COMPUTE: tl.constexpr):
    """Values in the dtype of the arithmetic; zeros outside of the mask."""
    if mask is None:
        return tl.load(ptr + at).to(COMPUTE)
    else:
        return tl.load(ptr + at, mask, other=0.0).to(COMPUTE)


@triton.jit
def _narrow(x, DTYPE: tl.constexpr):
    """To a storage dtype; from float64 to 16 bits by way of float32, as in torch."""
    if DTYPE.primitive_bitwidth == 16:
        return x.to(tl.float32).to(DTYPE)
    else:
        return x.to(DTYPE)
