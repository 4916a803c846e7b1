"""The writing kernels of the fused ASGA step: perturb, combine and the updates, one program for each chunk of a tensor.

`asga.kernels.sam` launches them, `asga.ops.sam_reference` defines the arithmetic.
"""

import triton
import triton.language as tl

from asga.kernels.quant_math import divide
from asga.kernels.sam_math import (
    BACKUPS,
    FIRST_GRADS,
    GRADS,
    MOMENTS,
    PARAMS,
    SQUARES,
    combination,
    combined,
    narrow,
    rate_of,
    read,
    square_root,
    subtract,
)
from asga.kernels.tensor_lists import as_double, is_there, part_of, pointer_of


@triton.jit(do_not_specialize=["tensors"])
def perturb_kernel(
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
    """A3: ``backup <- theta; theta <- theta + s T^2 g; first_grad <- g``."""
    entry, start, count, rho_scale = part_of(table_ptr, chunks_ptr, tensors, OPERANDS, CHUNK)
    g_ptr, theta_ptr, first_ptr, backup_ptr = _pointers(*(table_ptr, tensors, entry, start, DTYPE, GRAD_DTYPE, ALIGNED))
    keeps = False
    if KEEPS:
        keeps = is_there(table_ptr, FIRST_GRADS, tensors, entry)
    perturbed = rho_scale != 0
    size = (tl.load(step_ptr) * (rho_scale * rho_scale)).to(COMPUTE)
    offsets = tl.arange(0, TILE)
    for tile in range(0, tl.cdiv(count, TILE)):
        at = tile * TILE + offsets
        if (tile + 1) * TILE <= count:
            _perturb(
                *(g_ptr, theta_ptr, first_ptr, backup_ptr, at, None, size, perturbed, keeps, DTYPE, ADAPTIVE),
            )
        else:
            _perturb(
                *(g_ptr, theta_ptr, first_ptr, backup_ptr, at, at < count, size, perturbed, keeps, DTYPE, ADAPTIVE),
            )


@triton.jit
def _perturb(
    g_ptr,
    theta_ptr,
    first_ptr,
    backup_ptr,
    at,
    mask,
    size,
    perturbed,
    keeps,
    DTYPE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):
    g = tl.load(g_ptr + at, mask)
    if keeps:
        tl.store(first_ptr + at, g, mask)
    if perturbed:
        kept = tl.load(theta_ptr + at, mask)
        theta = kept.to(size.dtype)
        direction = g.to(size.dtype)
        if ADAPTIVE:
            direction = (theta * theta) * direction
        moved = tl.where(size == 0, theta, theta + size * direction)
        tl.store(backup_ptr + at, kept, mask)
        tl.store(theta_ptr + at, narrow(moved, DTYPE), mask)


@triton.jit(do_not_specialize=["tensors"])
def combine_kernel(
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
    """B3 for any base optimizer: ``theta <- backup; g1 <- c0 g0 + c1 g1``."""
    entry, start, count, _ = part_of(table_ptr, chunks_ptr, tensors, OPERANDS, CHUNK)
    g_ptr, theta_ptr, first_ptr, backup_ptr = _pointers(*(table_ptr, tensors, entry, start, DTYPE, GRAD_DTYPE, ALIGNED))
    there = False
    if FIRST:
        there = is_there(table_ptr, FIRST_GRADS, tensors, entry)
    c0, c1, valid = combination(coefficients_ptr, COMPUTE)
    offsets = tl.arange(0, TILE)
    for tile in range(0, tl.cdiv(count, TILE)):
        at = tile * TILE + offsets
        if (tile + 1) * TILE <= count:
            _combine(g_ptr, theta_ptr, first_ptr, backup_ptr, at, None, c0, c1, valid, there, GRAD_DTYPE)
        else:
            _combine(g_ptr, theta_ptr, first_ptr, backup_ptr, at, at < count, c0, c1, valid, there, GRAD_DTYPE)


@triton.jit
def _combine(g_ptr, theta_ptr, first_ptr, backup_ptr, at, mask, c0, c1, valid, there, GRAD_DTYPE: tl.constexpr):
    tl.store(theta_ptr + at, tl.load(backup_ptr + at, mask), mask)
    if valid:
        d = combined(g_ptr, first_ptr, at, mask, c0, c1, there)
        tl.store(g_ptr + at, narrow(d, GRAD_DTYPE), mask)


@triton.jit(do_not_specialize=["tensors", "lr", "momentum", "weight_decay"])
def sgd_kernel(
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
    """B3 with SGD."""
    entry, start, count, _ = part_of(table_ptr, chunks_ptr, tensors, OPERANDS, CHUNK)
    g_ptr, theta_ptr, first_ptr, backup_ptr = _pointers(*(table_ptr, tensors, entry, start, DTYPE, GRAD_DTYPE, ALIGNED))
    moment_ptr = pointer_of(table_ptr, MOMENTS, tensors, entry, start, DTYPE, ALIGNED)
    there = False
    if FIRST:
        there = is_there(table_ptr, FIRST_GRADS, tensors, entry)
    c0, c1, valid = combination(coefficients_ptr, COMPUTE)
    rate = rate_of(lr_ptr, lr).to(COMPUTE)
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
        d = combined(g_ptr, first_ptr, at, mask, c0, c1, there)
        if DECAYS:
            d = d + weight_decay * theta
        if MOMENTUM:
            buffer = momentum * read(moment_ptr, at, mask, c0.dtype) + d
            tl.store(moment_ptr + at, narrow(buffer, DTYPE), mask)
            d = d + momentum * buffer if NESTEROV else buffer
        tl.store(theta_ptr + at, narrow(subtract(theta, rate * d), DTYPE), mask)
    else:
        tl.store(theta_ptr + at, kept, mask)


@triton.jit(
    do_not_specialize=["tensors", "sizes_stride", "lr", "beta1", "beta2", "eps", "weight_decay"],
)
def adam_kernel(
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
    """B3 with Adam or AdamW."""
    entry, start, count, _ = part_of(table_ptr, chunks_ptr, tensors, OPERANDS, CHUNK)
    g_ptr, theta_ptr, first_ptr, backup_ptr = _pointers(*(table_ptr, tensors, entry, start, DTYPE, GRAD_DTYPE, ALIGNED))
    moment_ptr = pointer_of(table_ptr, MOMENTS, tensors, entry, start, DTYPE, ALIGNED)
    square_ptr = pointer_of(table_ptr, SQUARES, tensors, entry, start, DTYPE, ALIGNED)
    there = False
    if FIRST:
        there = is_there(table_ptr, FIRST_GRADS, tensors, entry)
    c0, c1, valid = combination(coefficients_ptr, COMPUTE)
    size = tl.load(sizes_ptr + entry).to(COMPUTE)
    root = tl.load(sizes_ptr + sizes_stride + entry).to(COMPUTE)
    rest1 = (1.0 - as_double(beta1)).to(COMPUTE)
    rest2 = (1.0 - as_double(beta2)).to(COMPUTE)
    beta2 = as_double(beta2).to(COMPUTE)
    eps = as_double(eps).to(COMPUTE)
    shrink = (1.0 - rate_of(lr_ptr, lr) * as_double(weight_decay)).to(COMPUTE)
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
        d = combined(g_ptr, first_ptr, at, mask, c0, c1, there)
        if DECAYS:
            if DECOUPLED:
                theta = theta * shrink
            else:
                d = d + weight_decay * theta
        first = read(moment_ptr, at, mask, c0.dtype)
        second = read(square_ptr, at, mask, c0.dtype)
        first = first + rest1 * (d - first)
        second = beta2 * second + (rest2 * d) * d
        move = divide(size * first, divide(square_root(second), root) + eps)
        tl.store(moment_ptr + at, narrow(first, DTYPE), mask)
        tl.store(square_ptr + at, narrow(second, DTYPE), mask)
        tl.store(theta_ptr + at, narrow(subtract(theta, move), DTYPE), mask)
    else:
        tl.store(theta_ptr + at, kept, mask)


@triton.jit
def _pointers(table_ptr, tensors, entry, start, DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where this program's part of the four operands begins that all of these kernels have."""
    return (
        pointer_of(table_ptr, GRADS, tensors, entry, start, GRAD_DTYPE, ALIGNED),
        pointer_of(table_ptr, PARAMS, tensors, entry, start, DTYPE, ALIGNED),
        pointer_of(table_ptr, FIRST_GRADS, tensors, entry, start, GRAD_DTYPE, ALIGNED),
        pointer_of(table_ptr, BACKUPS, tensors, entry, start, DTYPE, ALIGNED),
    )
