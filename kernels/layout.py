"""How the kernels cut a tensor: a dense tensor in memory order is ``x[outer][channels][inner]``.

The kernels see it as ``x[loops][channels][length]`` with three strides and work on tiles of BLOCK_C channels
by BLOCK_L of the length. Two cases differ in the choice of names alone, so that one kernel serves both:

- channels outside (weights; a whole tensor is one channel): loops = outer, length = inner = contiguous;
- channels innermost (channels_last activations, inner = 1): loops = 1, length = outer, channels = contiguous.

Tiles and grids depend on sizes and dtype alone, so that the same input gives the same sums on every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4

# A tile is one or two 16-byte vectors for each of the 128 threads. Two put enough loads in flight to cover the
# latency of memory, and leave enough registers for the sums of a mixture's eight candidates.
_VECTOR_BYTES = 16
# Triton knows of sizes and strides whether 16 divides them: the condition for vectors.
_KNOWN_DIVISOR = 16
# Where a thread cannot add up a vector first, it keeps sums for each of its elements: it gets only four.
_UNFOLDED_TILE = 4 * 32 * NUM_WARPS
# With the channels innermost, one row of such a tile: a warp that loads 16 bytes of float32 a thread.
_MAX_BLOCK_C_INNERMOST = 128
# Shortest run of contiguous elements in a tile; below it, lanes idle.
_MIN_BLOCK_L = 16
# Most programs of a reduction: several times what a large GPU holds at once (132 processors with 4 to 8
# programs each on an H100), so that the last wave is short, and still few partial sums.
_TARGET_PROGRAMS = 4096
# A partial sum stands for at least this many values where there are that many: partial sums are traffic too.
_MIN_VALUES_PER_PARTIAL = 32
# As in csrc/cuda/column_cut.h: within this many bytes of partial sums there may be that many programs. Beyond, there
# are no fewer than the registers of 132 processors hold of a mixture at once.
_PARTIAL_BYTES = 2**20
_FEWEST_PROGRAMS = 4 * 132


class Layout(NamedTuple):
    """A tensor cut into tiles: sizes and strides in elements, tile shape, and the grid of the reductions."""

    loops: int
    channels: int
    length: int
    loop_stride: int
    channel_stride: int
    length_stride: int
    block_c: int
    block_l: int
    fold: int

    @property
    def channel_blocks(self) -> int:
        """Tiles side by side along the channels."""
        return triton.cdiv(self.channels, self.block_c)

    @property
    def tiles(self) -> int:
        """Tiles of one block of channels."""
        return self.loops * triton.cdiv(self.length, self.block_l)

    def splits(self, sum_bytes: int) -> int:
        """Programs that share the tiles of one block of channels in a reduction: one partial sum each.

        Args:
            sum_bytes: Of the partial sums that a program leaves for a channel.
        """
        within = _PARTIAL_BYTES // (self.channels * sum_bytes)
        tiles_per_program = max(
            triton.cdiv(self.tiles, max(within, triton.cdiv(_FEWEST_PROGRAMS, self.channel_blocks))),
            triton.cdiv(self.tiles * self.channel_blocks, _TARGET_PROGRAMS),
            triton.cdiv(_MIN_VALUES_PER_PARTIAL, self.block_l),
        )
        return triton.cdiv(self.tiles, tiles_per_program)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Strides of loops, channels and length."""
        return self.loop_stride, self.channel_stride, self.length_stride


def layout_of(input: Tensor, axis: int | None, *, vectors: int = 2) -> Layout:
    """Cut a dense, non-empty tensor.

    Args:
        input: Non-overlapping and dense, in any order of dimensions.
        axis: Dimension of the channels, or None for one channel in all.
        vectors: 16-byte vectors of each thread in a tile, 1 or 2, where vectors fit the layout.

    Returns:
        The layout. Needs no order of the other dimensions: in a dense tensor the stride of `axis` is `inner`.
    """
    if axis is None or input.shape[axis] == 1:
        numel = input.numel()
        tile, vector = _tile_and_vector(input, numel, vectors)
        return Layout(1, 1, numel, numel, numel, 1, 1, tile, vector)
    channels, inner = input.shape[axis], input.stride(axis)
    outer = input.numel() // (channels * inner)
    if inner == 1:
        block_c = min(triton.next_power_of_2(channels), _MAX_BLOCK_C_INNERMOST)
        block_l = _UNFOLDED_TILE // block_c
        return Layout(1, channels, outer, input.numel(), 1, channels, block_c, block_l, 1)
    tile, vector = _tile_and_vector(input, inner, vectors)
    block_l = _block_length(inner, tile)
    block_c = min(triton.next_power_of_2(channels), tile // block_l)
    return Layout(outer, channels, inner, channels * inner, inner, 1, block_c, block_l, vector)


def dense_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the memory order of the dense tensor `like`: itself if it is so already, else a copy."""
    for size, ours, wanted in zip(tensor.shape, tensor.stride(), like.stride(), strict=True):
        if size > 1 and ours != wanted:
            return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return tensor


def partial_sums(input: Tensor, *shape: int) -> Tensor:
    """Uninitialized memory for partial sums of a reduction over `input`."""
    return torch.empty(shape, dtype=accumulator(input), device=input.device)


def accumulator(input: Tensor) -> torch.dtype:
    """The dtype of the arithmetic and of the sums."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def finish_blocks(channels: int) -> tuple[int, int]:
    """Splits and channels that a program adds up at a time: two shapes, so two kernels serve all sizes."""
    return (1024, 1) if channels == 1 else (32, 32)


def _block_length(inner: int, tile: int) -> int:
    """The longest run whose padding wastes at most an eighth of the lanes, or the least if none does."""
    runs = [1 << power for power in range(_MIN_BLOCK_L.bit_length() - 1, tile.bit_length())]
    padded = {run: triton.cdiv(inner, run) * run for run in runs}
    allowed = max(min(padded.values()), inner * 9 // 8)
    return max(run for run in runs if padded[run] <= allowed)


def _tile_and_vector(input: Tensor, inner: int, vectors: int) -> tuple[int, int]:
    """Elements of a tile, and adjacent elements that one thread loads at a time."""
    if inner % _KNOWN_DIVISOR:
        return _UNFOLDED_TILE, 1
    vector = _VECTOR_BYTES // input.element_size()
    return vectors * 32 * NUM_WARPS * vector, vector


@triton.jit
def blocks(count, BLOCK: tl.constexpr):
    """Blocks of at least one value; what `tl.cdiv` adds up first would exceed 32 bits just below 2^31 values."""
    return (count - 1) // BLOCK + 1


@triton.jit
def tile_base(tile, first_channel, length, loop_stride, channel_stride, length_stride, BLOCK_L: tl.constexpr):
    """Offset of the first element of a tile, and how much of the length is left from there on."""
    length_tiles = blocks(length, BLOCK_L)
    start = (tile % length_tiles).to(tl.int64) * BLOCK_L
    loop = (tile // length_tiles).to(tl.int64)
    base = loop * loop_stride + first_channel.to(tl.int64) * channel_stride + start * length_stride
    return base, length - start


@triton.jit
def tile_offsets(channel_stride, length_stride, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr):
    """Offsets [BLOCK_C, BLOCK_L] of the elements of a tile from its first one."""
    channel = tl.arange(0, BLOCK_C).to(tl.int64)[:, None]
    return channel * channel_stride + tl.arange(0, BLOCK_L)[None, :] * length_stride


@triton.jit
def fold(terms, FOLD: tl.constexpr):
    """Add up FOLD adjacent elements along the length: [BLOCK_C, BLOCK_L] to [BLOCK_C, BLOCK_L / FOLD].

    They belong to one thread, so this takes no exchange and leaves fewer sums to keep in registers.
    """
    if FOLD == 1:
        return terms
    return tl.sum(tl.reshape(terms, [terms.shape[0], terms.shape[1] // FOLD, FOLD]), axis=2)


@triton.jit
def sum_partials(partials_ptr, channel, channels, splits, BLOCK_SPLITS: tl.constexpr):
    """Sum ``partials[splits][channels]`` over the splits, in float64, for a block of channels."""
    total = tl.zeros([BLOCK_SPLITS, channel.shape[0]], tl.float64)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        offsets = split.to(tl.int64)[:, None] * channels + channel[None, :]
        mask = (split < splits)[:, None] & (channel < channels)[None, :]
        total += tl.load(partials_ptr + offsets, mask, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)
