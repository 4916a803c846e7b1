import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

import triton
import triton.language as tl

from asga.kernels import layout

TILE = 1024  # float32


@triton.jit
def _store_tile_base(
    output_ptr, tile, first_channel, length, loop_stride, channel_stride, length_stride, BLOCK_L: tl.constexpr
):
    first_channel += tl.program_id(0)  # program ids are 0 here: makes it a tensor, as in the kernels
    base, left = layout.tile_base(tile, first_channel, length, loop_stride, channel_stride, length_stride, BLOCK_L)
    tl.store(output_ptr, base)
    tl.store(output_ptr + 1, left)


@pytest.mark.parametrize(
    ("tile", "first_channel", "length", "strides", "base", "left"),
    [
        pytest.param(3 * 2**20 + 1, 0, 2**32 + 5, (2**32 + 5, 2**32 + 5, 1), 3 * 2**30 + TILE, 2**30 + 5 - TILE),
        pytest.param(2**20, 7, TILE, (2**14, TILE, 1), 2**34 + 7 * TILE, TILE),
        pytest.param(2**18, 0, 2**29, (2**31, 1, 8), 2**31, 2**29 - 2**28),
        # Adding a block to this length exceeds 32 bits.
        pytest.param(2**21 - 1, 0, 2**31 - 1, (2**31 - 1, 2**31 - 1, 1), 2**31 - TILE, TILE - 1),
    ],
    ids=["one long channel", "many loops", "channels innermost", "as long as 32 bits can be"],
)
def test_offsets_beyond_32_bits(tile, first_channel, length, strides, base, left, device):
    output = torch.zeros(2, dtype=torch.int64, device=device)
    _store_tile_base[(1,)](output, tile, first_channel, length, *strides, BLOCK_L=TILE)
    assert output.tolist() == [base, left]


@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "expected"),
    [
        pytest.param((64, 64, 56, 56), None, torch.float32, (1, 1024), id="activation"),
        pytest.param((64, 64, 56, 56), None, torch.bfloat16, (1, 2048), id="activation, bfloat16"),
        pytest.param((512, 512, 3, 3), 0, torch.float32, (1, 1024), id="large weight"),
        pytest.param((64, 64, 3, 3), 0, torch.float32, (8, 128), id="small weight"),
        pytest.param((64, 3, 7, 7), 0, torch.float32, (16, 32), id="first layer"),
        pytest.param((32, 1, 3, 3), 0, torch.float32, (32, 16), id="depthwise weight"),
        pytest.param((4096, 512), 1, torch.float32, (128, 4), id="channels innermost"),
    ],
)
def test_tile_shapes(shape, axis, dtype, expected):
    cut = layout.layout_of(torch.empty(shape, dtype=dtype, device="meta"), axis)
    assert (cut.block_c, cut.block_l) == expected


@pytest.mark.parametrize("inner", [2, 9, 27, 49, 147, 196, 576, 1009, 4608])
def test_padding_idles_few_lanes(inner):
    cut = layout.layout_of(torch.empty(512, inner, device="meta"), 0)
    padded = triton.cdiv(inner, cut.block_l) * cut.block_l
    assert padded <= max(inner * 9 // 8, 16, 32 * triton.cdiv(inner, 32))


@pytest.mark.parametrize("shape", [(2**22,), (2**12, 2**10), (2**21, 2)], ids=str)
def test_a_reduction_has_enough_and_not_too_many_programs(shape):
    axis = None if len(shape) == 1 else 1
    cut = layout.layout_of(torch.empty(shape, device="meta"), axis)
    assert layout._FEWEST_PROGRAMS <= cut.splits(4) * cut.channel_blocks <= layout._TARGET_PROGRAMS
    values_per_partial = torch.Size(shape).numel() / (cut.splits(4) * cut.channels)
    assert values_per_partial >= layout._MIN_VALUES_PER_PARTIAL


@pytest.mark.parametrize(
    ("shape", "candidates", "offset", "most"),
    [
        pytest.param((64, 64, 56, 56), 1, False, 2**20, id="one quantizer"),
        pytest.param((64, 64, 56, 56), 5, False, 2**20, id="64 channels"),
        pytest.param((64, 256, 56, 56), 5, False, 1.4e6, id="256 channels"),
        pytest.param((64, 256, 56, 56), 5, True, 2.8e6, id="256 channels, zero points"),
        pytest.param((64, 2048, 7, 7), 5, False, 1.4e6, id="2048 channels"),
        pytest.param((64, 2048, 7, 7), 8, True, 4.4e6, id="2048 channels, K=8, zero points"),
        # A program for every block of channels: one sum for each scale.
        pytest.param((64, 2**17, 1, 1), 5, False, 4 * 5 * 2**17, id="more channels than programs"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_partial_sums_take_few_bytes_and_leave_enough_programs(shape, candidates, offset, most, dtype, memory_format):
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=memory_format)
    cut = layout.layout_of(x, 1)
    sum_bytes = 4 * candidates * (1 + offset)
    splits = cut.splits(sum_bytes)
    assert splits * cut.channels * sum_bytes <= most
    assert splits * cut.channel_blocks >= min(0.75 * layout._FEWEST_PROGRAMS, cut.tiles * cut.channel_blocks / 8)


def test_a_dense_tensor_is_not_copied():
    x = torch.empty(2, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    assert layout.dense_like(x, torch.empty_like(x)) is x


def test_a_tensor_with_gaps_is_copied_in_its_own_order():
    x = torch.arange(24.0).reshape(4, 6).t()[:, ::2]
    copy = layout.dense_like(x, torch.empty_like(x))
    assert copy.stride() == torch.empty_like(x).stride()
    assert torch.equal(copy, x)
