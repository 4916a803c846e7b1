"""The scalars of the fused ASGA step, in float64 and on the device: kernels of a single warp.

`asga.kernels.sam` launches them, `asga.ops.sam_reference` defines the arithmetic.
"""

import triton
import triton.language as tl

from asga.kernels.sam_math import is_finite, rate_of
from asga.kernels.tensor_lists import as_double


@triton.jit(do_not_specialize=["shift"])
def ascent_step_kernel(result_ptr, q0_ptr, rho_ptr, grad_scale_ptr, shift, RELATIVE: tl.constexpr):
    """A2: ``(1 - shift) rho / sqrt(q0)`` or ``rho / sqrt(q0) - shift / S``; 0 where q0 is 0 or not finite."""
    q = tl.load(q0_ptr)
    shift = as_double(shift)
    step = tl.load(rho_ptr) / tl.sqrt(q)
    if RELATIVE:
        step = step * (1.0 - shift)
    elif grad_scale_ptr is None:
        step = step - shift
    else:
        step = step - shift / tl.load(grad_scale_ptr)
    tl.store(result_ptr, tl.where(is_finite(q) & (q > 0), step, 0.0))


@triton.jit(do_not_specialize=["weight", "max_norm", "rho_min", "rho_max"])
def coefficients_kernel(
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
    """B2 and B4: ``[c0, c1, valid, h]``, the radius and the counters."""
    q = tl.load(q0_ptr)
    zero, one = tl.full((), 0.0, tl.float64), tl.full((), 1.0, tl.float64)
    inverse = one
    if grad_scale_ptr is not None:
        inverse = 1.0 / tl.load(grad_scale_ptr)
    valid = is_finite(q)
    if found_inf_ptr is not None:
        valid = valid & (tl.load(found_inf_ptr) == 0)
    for i in tl.static_range(LOSSES):
        valid = valid & is_finite(tl.load(losses_ptr + i))

    gap = one * float("nan")
    g0_g0, g0_g1, g1_g1, k = zero, zero, zero, zero
    if dots_ptr is not None:
        g0_g0, g0_g1, g1_g1 = tl.load(dots_ptr), tl.load(dots_ptr + 1), tl.load(dots_ptr + 2)
        ascent = tl.load(dots_ptr + 3)
        valid = valid & is_finite(g0_g0) & is_finite(g0_g1) & is_finite(g1_g1) & is_finite(ascent)
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
        moves = valid & is_finite(gap)
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


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "count"])
def adam_sizes_kernel(
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
    """The step sizes and roots of Adam for each tensor; counts its steps where the step is valid."""
    i = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    mask = i < count
    step_ptr = tl.load(steps_ptr + i, mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask, other=0.0)
    number = step.to(tl.int64) + 1
    size = rate_of(lr_ptr, lr) / (1.0 - _power(as_double(beta1), number))
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
