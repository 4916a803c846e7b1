"""The arithmetic of the quantizers, as in csrc/quant_math.h. `asga.ops.reference` is the definition.

Launch every kernel that uses it with ``enable_fp_fusion=False``: a fused multiply-add rounds once where the
definition rounds twice.
"""

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """Float32 for narrower types; float64 stays."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def divide(x, y):
    """IEEE division; `/` on float32 is an approximation in Triton."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def clamp(x, low, high):
    """Limit x to [low, high]; NaN stays NaN."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_half_even(x):
    """Round where |x| < 2**22 (float64: 2**51) without a library call; never yields -0.0.

    Next to 1.5 * 2**23 (float64: 1.5 * 2**52) there is no room for a fraction.
    """
    if x.dtype == tl.float64:
        return (x + 6755399441055744.0) - 6755399441055744.0
    else:
        return (x + 12582912.0) - 12582912.0
