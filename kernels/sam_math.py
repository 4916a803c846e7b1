"""What the kernels of the fused ASGA step share: the numbers of their operands, and the arithmetic of one value."""

import triton
import triton.language as tl

from asga.kernels.tensor_lists import as_double

# The operands by their rows in the table of pointers.
GRADS = tl.constexpr(0)
PARAMS = tl.constexpr(1)
FIRST_GRADS = tl.constexpr(2)
BACKUPS = tl.constexpr(3)
MOMENTS = tl.constexpr(4)
SQUARES = tl.constexpr(5)


@triton.jit
def read(ptr, at, mask, COMPUTE: tl.constexpr):
    """Values in the dtype of the arithmetic; zeros outside of the mask."""
    if mask is None:
        return tl.load(ptr + at).to(COMPUTE)
    else:
        return tl.load(ptr + at, mask, other=0.0).to(COMPUTE)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """To a storage dtype; from float64 to 16 bits by way of float32, as in torch."""
    if DTYPE.primitive_bitwidth == 16:
        return x.to(tl.float32).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def combination(coefficients_ptr, COMPUTE: tl.constexpr):
    """c0 and c1 in the dtype of the arithmetic, and whether anything but the restored weights may be written."""
    c0 = tl.load(coefficients_ptr).to(COMPUTE)
    c1 = tl.load(coefficients_ptr + 1).to(COMPUTE)
    return c0, c1, tl.load(coefficients_ptr + 2) != 0


@triton.jit
def combined(g_ptr, first_ptr, at, mask, c0, c1, there):
    """d = c0 g0 + c1 g1; without a g0 the second term alone, whose -0.0 a sum with zero would lose."""
    d = c1 * read(g_ptr, at, mask, c0.dtype)
    if there:
        d = c0 * read(first_ptr, at, mask, c0.dtype) + d
    return d


@triton.jit
def subtract(theta, move):
    """theta - move, and theta to the bit where the move is zero: -0.0 - (-0.0) would be 0.0."""
    return tl.where(move == 0, theta, theta - move)


@triton.jit
def square_root(x):
    """Rounded correctly."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def rate_of(lr_ptr, lr):
    """The learning rate, float64: the tensor takes the place of the number."""
    if lr_ptr is None:
        return as_double(lr)
    else:
        return tl.load(lr_ptr)


@triton.jit
def is_finite(x):
    """Neither infinite nor NaN."""
    return tl.abs(x) < float("inf")
