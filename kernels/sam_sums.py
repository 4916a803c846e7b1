"""The sums of the fused ASGA step: a partial sum of each chunk of a tensor, and then their total in float64.

`asga.kernels.sam` launches them, `asga.ops.sam_reference` defines the arithmetic.
"""

import triton
import triton.language as tl

from asga.kernels.sam_math import FIRST_GRADS, GRADS, PARAMS, read
from asga.kernels.tensor_lists import is_there, part_of, pointer_of


@triton.jit(do_not_specialize=["tensors", "slots"])
def norm_kernel(
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
    """A1: ``rho_scale^2 sum g^2`` of a chunk, or of ``theta g``."""
    entry, start, count, rho_scale = part_of(table_ptr, chunks_ptr, tensors, OPERANDS, CHUNK)
    g_ptr = pointer_of(table_ptr, GRADS, tensors, entry, start, GRAD_DTYPE, ALIGNED)
    theta_ptr = g_ptr
    if ADAPTIVE:
        theta_ptr = pointer_of(table_ptr, PARAMS, tensors, entry, start, DTYPE, ALIGNED)
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
    g = read(g_ptr, offsets, mask, COMPUTE)
    if ADAPTIVE:
        g = read(theta_ptr, offsets, mask, COMPUTE) * g
    return g * g


@triton.jit(do_not_specialize=["tensors", "slots"])
def dots_kernel(
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
    """B1: the four sums of a chunk."""
    entry, start, count, rho_scale = part_of(table_ptr, chunks_ptr, tensors, OPERANDS, CHUNK)
    g1_ptr = pointer_of(table_ptr, GRADS, tensors, entry, start, GRAD_DTYPE, ALIGNED)
    g0_ptr, theta_ptr = g1_ptr, g1_ptr
    there = False
    if FIRST:
        g0_ptr = pointer_of(table_ptr, FIRST_GRADS, tensors, entry, start, GRAD_DTYPE, ALIGNED)
        there = is_there(table_ptr, FIRST_GRADS, tensors, entry)
    if ADAPTIVE:
        theta_ptr = pointer_of(table_ptr, PARAMS, tensors, entry, start, DTYPE, ALIGNED)
    offsets = tl.arange(0, TILE)
    zeros = tl.zeros([TILE], COMPUTE)
    g0_g0, g0_g1, g1_g1, metric = zeros, zeros, zeros, zeros
    for tile in range(0, count // TILE):
        at = tile * TILE + offsets
        g1 = read(g1_ptr, at, None, COMPUTE)
        g1_g1 += g1 * g1
        if there:
            g0 = read(g0_ptr, at, None, COMPUTE)
            g0_g0 += g0 * g0
            g0_g1 += g0 * g1
            if ADAPTIVE:
                theta = read(theta_ptr, at, None, COMPUTE)
                metric += (theta * g0) * (theta * g1)
    last = count // TILE * TILE
    if last < count:
        at = last + offsets
        mask = at < count
        g1 = read(g1_ptr, at, mask, COMPUTE)
        g1_g1 += g1 * g1
        if there:
            g0 = read(g0_ptr, at, mask, COMPUTE)
            g0_g0 += g0 * g0
            g0_g1 += g0 * g1
            if ADAPTIVE:
                theta = read(theta_ptr, at, mask, COMPUTE)
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
def sam_finish_kernel(totals_ptr, partials_ptr, slots, BLOCK: tl.constexpr):
    """The totals over all chunks: one program for each sum, always in the same order."""
    term = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, slots, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + term.to(tl.int64) * slots + slot, slot < slots, other=0.0)
    tl.store(totals_ptr + term, tl.sum(total, axis=0))
