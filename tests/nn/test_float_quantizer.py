import copy
import math

import pytest
import torch
from torch import nn

from asga.nn import FloatWeightQuantizer
from asga.ops.floats import nearest_float

FORMATS = ("fp4", "fp8")


@pytest.fixture
def weight() -> torch.Tensor:
    """45 values a channel: two blocks of 16 and one of 13."""
    return torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))


def stored_blocks(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a file would hold: block scales in torch's own E4M3, and the scale of the tensor."""
    tensor_scale = scale.max() / 448
    return (scale / tensor_scale).to(torch.float8_e4m3fn), tensor_scale


def decoded(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A weight in fp4, block by block."""
    blocks, tensor_scale = stored_blocks(scale)
    rows = weight.flatten(1)
    columns = []
    for b, start in enumerate(range(0, rows.shape[1], 16)):
        factor = blocks[:, b].float()[:, None] * tensor_scale
        columns.append(nearest_float(rows[:, start : start + 16] / factor, "fp4") * factor)
    return torch.cat(columns, 1).reshape(weight.shape)


class TestForward:
    def test_fp8_is_the_cast_of_torch_per_channel(self, weight):
        quantizer = FloatWeightQuantizer(weight, "fp8")
        assert quantizer.scale.shape == (6,)
        scale = quantizer.scale.detach().reshape(6, 1, 1, 1)
        expected = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(quantizer(weight), expected)

    def test_fp4_has_blocks_of_16_with_scales_in_e4m3(self, weight):
        quantizer = FloatWeightQuantizer(weight, "fp4")
        assert quantizer.scale.shape == (6, 3)
        assert torch.equal(quantizer(weight), decoded(weight, quantizer.scale.detach()))
        blocks, _ = stored_blocks(quantizer.scale.detach())
        assert blocks.float().max() == 448

    @pytest.mark.parametrize("values", [1, 15, 16, 17, 64])
    def test_fp4_of_any_length(self, values):
        weight = torch.randn(3, values, generator=torch.Generator().manual_seed(1))
        quantizer = FloatWeightQuantizer(weight, "fp4")
        assert quantizer.scale.shape == (3, math.ceil(values / 16))
        assert torch.equal(quantizer(weight), decoded(weight, quantizer.scale.detach()))

    def test_block_scales_far_below_the_largest_do_not_vanish(self):
        weight = torch.ones(1, 32)
        weight[:, 16:] = 1e-9
        quantizer = FloatWeightQuantizer(weight, "fp4")
        assert torch.isfinite(quantizer(weight)).all()
        assert quantizer(weight)[0, 16:].abs().max() < 1e-6  # 448 * 2**9 below the largest the scale ends

    @pytest.mark.parametrize("bits", FORMATS)
    def test_is_finer_than_fewer_bits(self, weight, bits):
        # fp4 has 3 significant values an octave or less; uniform rounding to 6 % and 25 % of a value bounds the error.
        noise = (FloatWeightQuantizer(weight, bits)(weight) - weight).norm() / weight.norm()
        assert noise < {"fp4": 0.25, "fp8": 0.0625}[bits] / math.sqrt(3)

    @pytest.mark.parametrize("bits", FORMATS)
    def test_keeps_dtype_and_layout(self, weight, bits):
        weight = weight.bfloat16().to(memory_format=torch.channels_last)
        quantizer = FloatWeightQuantizer(weight, bits)
        assert quantizer.scale.dtype == torch.float32
        assert quantizer(weight).dtype == torch.bfloat16
        assert quantizer(weight).stride() == weight.stride()
        assert torch.equal(quantizer(weight), quantizer(weight.contiguous()))


@pytest.mark.parametrize("bits", FORMATS)
class TestScales:
    def test_gradient_is_straight_through_and_scaled(self, weight, bits):
        quantizer = FloatWeightQuantizer(weight, bits)
        with torch.no_grad():
            quantizer.scale.mul_(0.5)  # so that some values are beyond the range
        upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        quantizer(weight).backward(upstream)
        largest, scale = quantizer.quant_maxs[0], quantizer.scale.detach()
        if bits == "fp4":
            blocks, tensor_scale = stored_blocks(scale)
            used = (blocks.float() * tensor_scale).repeat_interleave(16, 1)[:, :45].reshape(weight.shape)
        else:
            used = scale.reshape(6, 1, 1, 1)
        v = weight / used
        inside = v.abs() <= largest
        assert not inside.all()
        terms = (upstream * (nearest_float(v, bits) - torch.where(inside, v, 0.0))).flatten(1)
        if bits == "fp4":
            expected = torch.stack([part.sum(1) for part in terms.split(16, 1)], 1) / (largest * math.sqrt(16))
        else:
            expected = terms.sum(1) / (largest * math.sqrt(45))
        torch.testing.assert_close(quantizer.scale.grad, expected, rtol=1e-4, atol=1e-6)

    def test_initial_ones_of_lsq(self, weight, bits):
        quantizer = FloatWeightQuantizer(weight, bits, init="lsq")
        parts = weight.flatten(1).abs().split(16 if bits == "fp4" else 45, 1)
        means = torch.stack([part.mean(1) for part in parts], 1)
        expected = 2 * means / math.sqrt(quantizer.quant_maxs[0])
        torch.testing.assert_close(quantizer.scale.detach(), expected.reshape(quantizer.scale.shape))

    def test_least_squares_is_no_worse(self, weight, bits):
        errors = {i: (FloatWeightQuantizer(weight, bits, init=i)(weight) - weight).norm() for i in ("lsq", "mse")}
        assert errors["mse"] < errors["lsq"]

    def test_zero_weights_stay_zero_with_positive_scales(self, weight, bits):
        weight[0] = 0
        for given in (weight, torch.zeros_like(weight)):
            quantizer = FloatWeightQuantizer(given, bits)
            assert (quantizer.scale > 0).all()
            assert torch.equal(quantizer(given)[0], torch.zeros(5, 3, 3))

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan], ids=str)
    def test_collapsed_scales_are_used_at_their_floor(self, weight, bits, value):
        quantizer = FloatWeightQuantizer(weight, bits)
        at_floor = copy.deepcopy(quantizer)
        with torch.no_grad():
            at_floor.scale.mul_(0.02)
            quantizer.scale.fill_(value)
        assert torch.equal(quantizer(weight), at_floor(weight))

    def test_initialize_sets_them_anew(self, weight, bits):
        quantizer = FloatWeightQuantizer(weight, bits)
        before = quantizer.scale.detach().clone()
        quantizer.initialize(4 * weight)
        torch.testing.assert_close(quantizer.scale.detach(), 4 * before)
        torch.testing.assert_close(quantizer.floor, 0.08 * before)


@pytest.mark.parametrize("bits", FORMATS)
def test_state_and_copy(weight, bits):
    quantizer = FloatWeightQuantizer(weight, bits)
    expected = quantizer(weight)
    other = FloatWeightQuantizer(2 * weight, bits)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(weight), expected)
    assert torch.equal(copy.deepcopy(quantizer)(weight), expected)
    assert (quantizer.bits, repr(quantizer)) == (bits, f"FloatWeightQuantizer(bits='{bits}')")


@pytest.mark.parametrize("bits", FORMATS)
def test_compiles_to_one_graph(weight, bits):
    quantizer, parameter = FloatWeightQuantizer(weight, bits), nn.Parameter(weight)
    torch._dynamo.reset()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (compiled, quantizer):
        parameter.grad = quantizer.scale.grad = None
        run(parameter).square().sum().backward()
        grads.append((parameter.grad, quantizer.scale.grad))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_formats_compile_together_for_dynamic_shapes(weight):
    fp4, fp8 = (FloatWeightQuantizer(weight, bits) for bits in ("fp4", "fp8"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda w: fp4(w) + fp8(w), fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(weight), fp4(weight) + fp8(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", FORMATS)
def test_scales_in_half_precision(weight, bits, dtype):
    """As a model has them after `model.to(dtype)`."""
    quantizer = FloatWeightQuantizer(weight, bits)
    expected = quantizer(weight)
    output = quantizer.to(dtype)(weight.to(dtype))
    output.sum().backward()
    assert (output.dtype, quantizer.scale.grad.dtype) == (dtype, dtype)
    assert quantizer.scale.grad.isfinite().all()
    error = (output.float() - expected).norm() / expected.norm()
    assert error < 0.1  # one that rounds to the other side of a tie moves by a step


@pytest.mark.parametrize(
    ("bits", "message"), [("fp6", "bits is 'fp6'"), ("int4", "one of 'fp4', 'fp8'"), (4, "bits is 4")]
)
def test_other_formats_are_refused(weight, bits, message):
    with pytest.raises(ValueError, match=message):
        FloatWeightQuantizer(weight, bits)
