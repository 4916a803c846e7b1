"""The CUDA kernels against the definition in plain torch, run on the CPU to share nothing with them.

What only a GPU can show of the Triton kernels is here too; tests/kernels has the rest of them.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from asga.ops import backend, backends, reference

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# A sum rounds once for each addition on the way of a term to the result. That is fewer than 64 at these sizes
# (values of a thread, five steps in the warp, eight warps; the rest is in float64).
ADDITIONS = 64

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def _plain(x: Tensor) -> Tensor:
    return x


# Name: (shape, axis, what turns a contiguous tensor of that shape into the input).
CASES: dict[str, tuple[tuple[int, ...], int | None, Callable[[Tensor], Tensor]]] = {
    "tensor-scalar": ((), None, _plain),
    "tensor-3": ((3,), None, _plain),
    "tensor-1023": ((1023,), None, _plain),
    "tensor-70001": ((70001,), None, _plain),
    "tensor-unaligned": ((5000,), None, lambda x: x[1:]),
    "tensor-gaps": ((60, 70), None, lambda x: x[:, ::2]),
    "tensor-transposed": ((60, 70), None, lambda x: x.t()),
    "tensor-overlapping": ((60, 1), None, lambda x: x.expand(60, 7)),
    "tensor-channels_last": ((2, 5, 6, 7), None, lambda x: x.contiguous(memory_format=torch.channels_last)),
    "rows-depthwise": ((20, 1, 3, 3), 0, _plain),
    "rows-576": ((6, 64, 3, 3), 0, _plain),
    "rows-4608": ((3, 512, 3, 3), 0, _plain),
    "rows-odd-1029": ((3, 1029), 0, _plain),
    "rows-long-40003": ((2, 40003), 0, _plain),
    "rows-groups-of-128": ((40, 128), 0, _plain),
    "rows-middle": ((2, 5, 49), 1, _plain),
    "rows-middle-block": ((2, 3, 1100), 1, _plain),
    "rows-unaligned": ((3, 601), 0, lambda x: x[:, 1:]),
    "rows-channels_last": ((4, 8, 3, 3), 0, lambda x: x.contiguous(memory_format=torch.channels_last)),
    "rows-one-channel": ((1, 600), 0, _plain),
    "columns-7": ((133, 7), 1, _plain),
    "columns-3-tall": ((9000, 3), 1, _plain),
    "columns-257": ((40, 257), 1, _plain),
    "columns-600": ((9, 600), 1, _plain),
    "columns-vectors": ((70, 64), 1, _plain),
    "columns-vectors-across-channels": ((40, 4, 6), 1, _plain),
    "columns-vectors-unaligned": ((41, 64), 1, lambda x: x.view(-1)[1 : 1 + 40 * 64].view(40, 64)),
    "columns-vectors-channels_last": ((2, 72, 5, 3), 1, lambda x: x.contiguous(memory_format=torch.channels_last)),
    "columns-one-row": ((300,), 0, _plain),
    "columns-short-rows": ((64, 5, 9), 1, _plain),
    "columns-channels_last": ((2, 5, 6, 7), 1, lambda x: x.contiguous(memory_format=torch.channels_last)),
    "columns-transposed": ((70, 60), 0, lambda x: x.t().contiguous().t()),
}
cases = pytest.mark.parametrize("case", CASES)
offsets = pytest.mark.parametrize("offset", [False, True], ids=["symmetric", "zero points"])
per_backend = pytest.mark.parametrize(
    "name",
    [
        "cuda",
        pytest.param("triton", marks=pytest.mark.skipif(bool(backends.unavailable("triton")), reason="no Triton here")),
    ],
)


@pytest.fixture(autouse=True, scope="module")
def _kernels_are_loaded():
    if torch._C._dispatch_has_kernel_for_dispatch_key("asga::fake_quant", DEVICE.upper()):
        return
    if os.environ.get("ASGA_CUDA") == "skip":
        pytest.skip("the CUDA library was left out (ASGA_CUDA=skip)")
    pytest.fail("there is a GPU but no CUDA library; build it with `ASGA_CUDA=force pip install -e .`")


def _make(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, int | None, int]:
    """Input and gradient on the CPU, axis and number of channels. Holds ties, both infinities, and -0.0."""
    shape, axis, view = CASES[case]
    generator = torch.Generator().manual_seed(sum(shape))
    base = torch.randn(shape, generator=generator)
    special = torch.tensor([0.75, -0.25, float("inf"), float("-inf"), -0.0, 1.25, 0.0])
    flat = base.view(-1)
    flat[: special.numel()] = special[: flat.numel()]
    input = view(base.to(dtype))
    grad = torch.randn(input.shape, generator=generator).to(dtype)
    channels = 1 if axis is None else input.shape[axis]
    return input, torch.empty_like(input).copy_(grad), axis, channels


def _on_device(tensor: Tensor) -> Tensor:
    """A copy on the device with the same strides and offset, gaps and overlaps included."""
    storage = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(DEVICE).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _scale(channels: int, dtype: torch.dtype) -> Tensor:
    # Halves among the scales make exact ties of the special values.
    return (torch.arange(channels) % 5 * 0.125 + 0.5).to(dtype)


def _zero_point(channels: int, dtype: torch.dtype) -> Tensor:
    return (torch.arange(channels) % 7 - 2.6).to(dtype)


def _per_value(parameter: Tensor, input: Tensor, axis: int | None) -> Tensor:
    """A parameter [..., C] as [..., numel]: the reference then returns the terms of a sum one by one."""
    if axis is None:
        return parameter.expand(*parameter.shape[:-1], input.numel())
    shape = [1] * input.dim()
    shape[axis] = -1
    lead = parameter.shape[:-1]
    return parameter.reshape(*lead, *shape).expand(*lead, *input.shape).reshape(*lead, -1)


def _sum_magnitudes(terms: Tensor, input: Tensor, axis: int | None) -> Tensor:
    """The sum of |terms| [..., numel] for each channel: [..., C]."""
    lead = terms.shape[:-1]
    terms = terms.double().abs().reshape((*lead, *input.shape))
    if axis is None:
        return terms.reshape(*lead, -1).sum(-1, keepdim=True)
    return terms.movedim(len(lead) + axis, len(lead)).reshape(*lead, input.shape[axis], -1).sum(-1)


def _assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    actual = actual.cpu()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    number = ~expected.isnan()
    assert torch.equal(actual.signbit() & number, expected.signbit() & number)


def _assert_sum(actual: Tensor, expected: Tensor, magnitude: Tensor, input: Tensor) -> None:
    """`magnitude` is the sum of the absolute values of the terms."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    rounding = torch.finfo(expected.dtype).eps * expected.double().abs()
    bound = ADDITIONS * torch.finfo(compute).eps * magnitude.reshape(expected.shape) + rounding
    assert torch.all((actual.cpu().double() - expected.double()).abs() <= bound)


class TestFakeQuant:
    @dtypes
    @cases
    @pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "zero_point"])
    def test_equals_reference(self, case, dtype, zero_point):
        input, grad, axis, channels = _make(case, dtype)
        scale = _scale(channels, dtype)
        offset = _zero_point(channels, dtype) if zero_point else None
        settings = (-4, 3, axis)
        device = [_on_device(t) if t is not None else None for t in (grad, input, scale, offset)]

        output = torch.ops.asga.fake_quant(*device[1:], *settings)
        _assert_same_bits(output, reference.fake_quant(input, scale, offset, *settings))

        actual = torch.ops.asga.fake_quant_backward(*device, *settings)
        expected = reference.fake_quant_backward(grad, input, scale, offset, *settings)
        _assert_same_bits(actual[0], expected[0])
        flat = [t.flatten() for t in (grad, input)]
        each = [None if p is None else _per_value(p, input, axis) for p in (scale, offset)]
        terms = reference.fake_quant_backward(*flat, *each, -4, 3, 0)
        _assert_sum(actual[1], expected[1], _sum_magnitudes(terms[1], input, axis), input)
        if zero_point:
            _assert_sum(actual[2], expected[2], _sum_magnitudes(terms[2], input, axis), input)
        else:
            assert actual[2].numel() == 0

    @dtypes
    def test_nan_passes_through_and_gets_no_gradient(self, dtype):
        input = torch.tensor([0.3, float("nan"), -0.2], dtype=dtype, device=DEVICE)
        scale = torch.tensor([0.5], dtype=dtype, device=DEVICE)
        output = torch.ops.asga.fake_quant(input, scale, None, -4, 3, None)
        assert output.isnan().tolist() == [False, True, False]
        grads = torch.ops.asga.fake_quant_backward(torch.ones_like(input), input, scale, None, -4, 3, None)
        assert grads[0].tolist() == [1.0, 0.0, 1.0]
        assert grads[1].isnan().all()

    @pytest.mark.parametrize("axis", [None, 0, 1])
    def test_empty(self, axis):
        input = torch.empty(0, 3, device=DEVICE)
        scale = torch.ones(1 if axis is None else input.shape[axis], device=DEVICE)
        assert torch.ops.asga.fake_quant(input, scale, scale, -4, 3, axis).shape == (0, 3)
        grads = torch.ops.asga.fake_quant_backward(input, input, scale, scale, -4, 3, axis)
        assert grads[0].shape == (0, 3)
        assert torch.equal(grads[1], torch.zeros_like(scale))
        assert torch.equal(grads[2], torch.zeros_like(scale))

    @pytest.mark.parametrize(
        "relayout",
        [
            lambda g: g.contiguous(),
            lambda g: g[:1, :1, :1, :1].expand_as(g),
            lambda g: g.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        ],
        ids=["contiguous", "expanded", "reversed"],
    )
    def test_gradient_with_other_strides(self, relayout):
        input, grad, axis, channels = _make("columns-channels_last", torch.float32)
        grad, scale = relayout(grad), _scale(channels, torch.float32)
        actual = torch.ops.asga.fake_quant_backward(
            _on_device(grad), _on_device(input), scale.to(DEVICE), None, -4, 3, axis
        )
        _assert_same_bits(actual[0], reference.fake_quant_backward(grad, input, scale, None, -4, 3, axis)[0])

    def test_scale_of_another_dtype_and_stride(self):
        input, grad, axis, channels = _make("rows-576", torch.bfloat16)
        scale = _scale(2 * channels, torch.float64)[::2]
        device = [_on_device(t) for t in (grad, input, scale)]
        output = torch.ops.asga.fake_quant(*device[1:], None, -4, 3, axis)
        _assert_same_bits(output, reference.fake_quant(input, scale, None, -4, 3, axis))
        grad_scale = torch.ops.asga.fake_quant_backward(*device, None, -4, 3, axis)[1]
        expected = reference.fake_quant_backward(grad, input, scale, None, -4, 3, axis)[1]
        # 1e-4: float32 sums of 576 terms, here stored in float64.
        torch.testing.assert_close(grad_scale.cpu(), expected, rtol=1e-4, atol=1e-4)

    def test_two_runs_give_the_same_bits(self):
        generator = torch.Generator().manual_seed(0)
        input, grad = torch.randn(2, 3_000_000, generator=generator).to(DEVICE)
        scale = torch.tensor([0.3], device=DEVICE)
        runs = [torch.ops.asga.fake_quant_backward(grad, input, scale, scale, -4, 3, None) for _ in range(2)]
        for first, second in zip(*runs, strict=True):
            assert torch.equal(first, second)

    def test_wrong_size_of_scale(self):
        input = torch.zeros(4, 3, device=DEVICE)
        with pytest.raises(RuntimeError, match="scale has 2 elements, but 4 are needed"):
            torch.ops.asga.fake_quant(input, torch.ones(2, device=DEVICE), None, -4, 3, 0)


class TestMixedFakeQuant:
    MINS = (-2, -4, -8, 0, -128, -32, -64, 0)
    MAXS = (1, 3, 7, 255, 127, 31, 63, 15)

    def _candidates(self, count: int, channels: int, axis: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales [K] or [K, C] and probabilities [K]."""
        scales = torch.stack([_scale(channels, torch.float64) / 2**k for k in range(count)])
        probs = torch.softmax(torch.linspace(-1.0, 1.0, count), 0)
        return (scales.reshape(count) if axis is None else scales).to(dtype), probs.to(dtype)

    def _check(self, case: str, dtype: torch.dtype, count: int, *, offset: bool) -> None:
        input, grad, axis, channels = _make(case, dtype)
        scales, probs = self._candidates(count, channels, axis, dtype)
        zero_points = self._zero_points(count, channels, axis, dtype) if offset else None
        settings = (list(self.MINS[:count]), list(self.MAXS[:count]))
        device = [None if t is None else _on_device(t) for t in (grad, input, scales, probs, zero_points)]

        output = torch.ops.asga.mixed_fake_quant(*device[1:], *settings, axis)
        _assert_same_bits(output, reference.mixed_fake_quant(input, scales, probs, zero_points, *settings, axis))

        actual = torch.ops.asga.mixed_fake_quant_backward(*device, *settings, axis)
        expected = reference.mixed_fake_quant_backward(grad, input, scales, probs, zero_points, *settings, axis)
        _assert_same_bits(actual[0], expected[0])
        flat = [t.flatten() for t in (grad, input)]
        each = [
            None if t is None else _per_value(t.reshape(count, channels), input, axis) for t in (scales, zero_points)
        ]
        terms = reference.mixed_fake_quant_backward(*flat, each[0], probs, each[1], *settings, 0)
        _assert_sum(actual[1], expected[1], _sum_magnitudes(terms[1], input, axis), input)
        alone = [
            reference.mixed_fake_quant(
                flat[1],
                each[0][k : k + 1],
                torch.ones_like(probs[:1]),
                None if each[1] is None else each[1][k : k + 1],
                [low],
                [high],
                0,
            )
            for k, (low, high) in enumerate(zip(*settings, strict=True))
        ]
        magnitude = (torch.stack(alone) * flat[0]).double().abs().sum(1)
        _assert_sum(actual[2], expected[2], magnitude, input)
        if offset:
            _assert_sum(actual[3], expected[3], _sum_magnitudes(terms[3], input, axis), input)
        else:
            assert actual[3].shape == (0,)

    def _zero_points(self, count: int, channels: int, axis: int | None, dtype: torch.dtype) -> Tensor:
        zero_points = torch.stack([_zero_point(channels, torch.float64) * (k - 2) for k in range(count)])
        return (zero_points.reshape(count) if axis is None else zero_points).to(dtype)

    @dtypes
    @cases
    @offsets
    def test_equals_reference(self, case, dtype, offset):
        self._check(case, dtype, 5, offset=offset)

    @pytest.mark.parametrize("count", range(1, 9), ids="K={}".format)
    @pytest.mark.parametrize("case", ["tensor-1023", "rows-576", "rows-odd-1029", "columns-7", "columns-vectors"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @offsets
    def test_every_number_of_candidates(self, case, dtype, count, offset):
        self._check(case, dtype, count, offset=offset)

    @dtypes
    def test_nan_passes_through_and_gets_no_gradient(self, dtype):
        input = torch.tensor([0.3, float("nan"), -0.2], dtype=dtype, device=DEVICE)
        scales, probs = (t.to(DEVICE) for t in self._candidates(2, 1, None, dtype))
        output = torch.ops.asga.mixed_fake_quant(input, scales, probs, None, [-2, -4], [1, 3], None)
        assert output.isnan().tolist() == [False, True, False]
        grads = torch.ops.asga.mixed_fake_quant_backward(
            torch.ones_like(input), input, scales, probs, None, [-2, -4], [1, 3], None
        )
        assert grads[0][1] == 0
        assert grads[1].isnan().all()
        assert grads[2].isnan().all()

    @pytest.mark.parametrize("axis", [None, 0, 1])
    def test_empty(self, axis):
        input = torch.empty(0, 3, device=DEVICE)
        scales = torch.ones(2 if axis is None else (2, input.shape[axis]), device=DEVICE)
        probs = torch.ones(2, device=DEVICE)
        grads = torch.ops.asga.mixed_fake_quant_backward(input, input, scales, probs, None, [-2, -4], [1, 3], axis)
        assert grads[0].shape == (0, 3)
        assert torch.equal(grads[1], torch.zeros_like(scales))
        assert torch.equal(grads[2], torch.zeros(2, device=DEVICE))
        assert grads[3].shape == (0,)
        grads = torch.ops.asga.mixed_fake_quant_backward(input, input, scales, probs, scales, [-2, -4], [1, 3], axis)
        assert torch.equal(grads[3], torch.zeros_like(scales))

    @pytest.mark.parametrize(
        ("mins", "maxs", "message"),
        [
            ([-2] * 9, [1] * 9, "quant_mins has 9 candidates; between 1 and 8 are supported"),
            ([-2, -4], [1], "quant_maxs has 1 entries but quant_mins has 2"),
            ([-2, -4, -8], [1, 3, 7], "scales has 2 elements, but 3 are needed"),
        ],
        ids=["too-many", "counts-differ", "scales-too-short"],
    )
    def test_wrong_number_of_candidates(self, mins, maxs, message):
        two = torch.ones(2, device=DEVICE)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.asga.mixed_fake_quant(torch.ones(3, device=DEVICE), two, two, None, mins, maxs, None)


def _all_operators(input: Tensor, grad: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor]:
    """Everything that the four operators return for an input with one scale per candidate, with zero points."""
    scales, probs, zero_points = parameters
    one = (scales[:1], zero_points[:1], -8, 7, None)
    several = (scales, probs, zero_points, [-2, -8], [1, 7], None)
    ops = torch.ops.asga
    return [
        ops.fake_quant(input, *one),
        *ops.fake_quant_backward(grad, input, *one),
        ops.mixed_fake_quant(input, *several),
        *ops.mixed_fake_quant_backward(grad, input, *several),
    ]


def _parameters() -> tuple[Tensor, ...]:
    return tuple(torch.tensor(values, device=DEVICE) for values in ([0.5, 0.25], [0.4, 0.6], [-1.4, 2.6]))


@per_backend
@cases
@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf"), 1e-45], ids=str)
def test_scales_that_mean_nothing_do_no_harm(case, scale, name):
    """They are not checked, as that would stall the GPU; they still take the arithmetic of the definition."""
    input, grad, axis, channels = _make(case, torch.float32)
    bad, offset = torch.full((channels,), scale), _zero_point(channels, torch.float32)
    several = torch.full((2,) if axis is None else (2, channels), scale)
    one = (bad, offset, -4, 3, axis)
    mixture = (several, torch.tensor([0.4, 0.6]), None, [-2, -8], [1, 7], axis)
    with backend(name):
        for operator, settings in (("fake_quant", one), ("mixed_fake_quant", mixture)):
            forward, backward = operator, f"{operator}_backward"
            given = [_on_device(t) if isinstance(t, Tensor) else t for t in settings]
            output = getattr(torch.ops.asga, forward)(_on_device(input), *given)
            _assert_same_bits(output, getattr(reference, forward)(input, *settings))
            actual = getattr(torch.ops.asga, backward)(_on_device(grad), _on_device(input), *given)
            expected = getattr(reference, backward)(grad, input, *settings)
            _assert_same_bits(actual[0], expected[0])
            for got, wanted in zip(actual[1:], expected[1:], strict=True):
                assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    torch.cuda.synchronize()  # an access out of bounds would be reported here


@per_backend
def test_nothing_waits_for_the_gpu(name):
    input, grad = torch.randn(2, 1 << 20, device=DEVICE)
    parameters = _parameters()
    with backend(name):
        _all_operators(input, grad, parameters)  # Triton compiles and loads its kernels, which may wait
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = _all_operators(input, grad, parameters)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    assert all(result.isfinite().all() for result in results)


@per_backend
def test_a_captured_graph_computes_with_new_values(name):
    input, grad = torch.randn(2, 1 << 20, device=DEVICE)
    parameters = _parameters()
    with backend(name):
        _all_operators(input, grad, parameters)  # loads the kernels, which a capture does not allow
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _all_operators(input, grad, parameters)
        input.neg_()
        parameters[0].mul_(1.5)
        graph.replay()
        first = [result.clone() for result in captured]
        graph.replay()
        for actual, again, expected in zip(captured, first, _all_operators(input, grad, parameters), strict=True):
            assert torch.equal(actual, expected)
            assert torch.equal(actual, again)


@per_backend
@pytest.mark.parametrize("rows", [2**28 + 513, 2**28 - 1], ids=["more", "a block less"])
@pytest.mark.parametrize("axis", [None, 1], ids=["rows", "columns"])
def test_around_2_to_31_values(axis, rows, name):
    """All zero but for the end, which offsets of 32 bits would not reach; nor would blocks, rounded up to."""
    channels = 8
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip(f"needs 20 GiB of free GPU memory for four tensors of bfloat16; {free / 2**30:.1f} GiB are free")
    input = torch.zeros(rows, channels, dtype=torch.bfloat16, device=DEVICE)
    end = slice(-640, None)
    input[end] = torch.linspace(-3, 3, 640 * channels, device=DEVICE).view(640, channels)
    scale = _scale(1 if axis is None else channels, torch.float32)
    probs = torch.tensor([0.4, 0.6])
    scales = torch.stack([scale, scale / 2]).reshape(2 if axis is None else (2, channels))
    on_cpu = input[end].cpu()
    one, several = (scale, None, -4, 3, axis), (scales, probs, None, [-2, -8], [1, 7], axis)
    with backend(name):
        for operator, settings in (("fake_quant", one), ("mixed_fake_quant", several)):
            on_gpu = [s.to(DEVICE) if isinstance(s, Tensor) else s for s in settings]
            output = getattr(torch.ops.asga, operator)(input, *on_gpu)
            _assert_same_bits(output[end], getattr(reference, operator)(on_cpu, *settings))
            assert not output[:-640].any()
            del output
            actual = getattr(torch.ops.asga, f"{operator}_backward")(input, input, *on_gpu)
            expected = getattr(reference, f"{operator}_backward")(on_cpu, on_cpu, *settings)
            _assert_same_bits(actual[0][end], expected[0])
            assert not actual[0][:-640].any()
            for got, wanted in zip(actual[1:], expected[1:], strict=True):
                # Zeros add nothing, so the sums are those of the 5,120 values, in some order.
                torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-3)
            del actual
