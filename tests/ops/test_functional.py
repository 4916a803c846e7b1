"""The public operators: arguments, autograd, and what torch does around them."""

import os
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from asga.ops import backend, backends, fake_quant, mixed_fake_quant

ops = torch.ops.asga
per_backend = pytest.mark.parametrize("name", ["reference", *(["cpu"] if backends.unavailable("cpu") is None else [])])
_interpreted = os.environ.get("TRITON_INTERPRET") == "1" and backends.unavailable("triton") is None

X = torch.linspace(-3, 3, 24).reshape(4, 6)
SCALE = torch.tensor([0.5])
MIXTURE = {"scales": torch.tensor([0.5, 0.25]), "probs": torch.tensor([0.4, 0.6])}
RANGES = {"quant_mins": [-2, -8], "quant_maxs": [1, 7]}


class TestFakeQuant:
    def test_values(self):
        y = fake_quant(torch.tensor([0.2, 0.3, 9.0, -9.0]), SCALE, quant_min=-2, quant_max=1)
        assert y.tolist() == [0.0, 0.5, 0.5, -1.0]

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
    def test_one_scale_may_have_any_shape(self, shape):
        scale = SCALE.reshape(shape).requires_grad_()
        y = fake_quant(X, scale, quant_min=-8, quant_max=7)
        y.sum().backward()
        assert torch.equal(y, fake_quant(X, SCALE, quant_min=-8, quant_max=7))
        assert scale.grad.shape == shape

    @per_backend
    @pytest.mark.parametrize(
        ("scale", "expected"),
        [
            (0.0, [0.0, float("nan"), 0.0]),
            (-0.5, [-1.0, 0.0, 4.0]),
            (float("nan"), [float("nan")] * 3),
            (float("inf"), [float("nan")] * 3),
        ],
        ids=["zero", "negative", "NaN", "infinite"],
    )
    def test_bad_scales_give_what_the_docstring_says(self, scale, expected, name):
        x, good = torch.tensor([-1.0, 0.0, 9.0]), torch.tensor([0.5])
        with backend(name):
            found = fake_quant(x, torch.tensor([scale]), quant_min=-8, quant_max=7)
            alone = fake_quant(x, good, quant_min=-8, quant_max=7)
            scales, probs = torch.tensor([0.5, scale]), torch.tensor([1.0, 1.0])
            both = mixed_fake_quant(x, scales, probs, quant_mins=[-8, -8], quant_maxs=[7, 7])
            none = mixed_fake_quant(x, scales, torch.tensor([1.0, 0.0]), quant_mins=[-8, -8], quant_maxs=[7, 7])
        torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)
        torch.testing.assert_close(both, alone + torch.tensor(expected), equal_nan=True)
        assert torch.equal(none.isnan(), torch.tensor(expected).isnan())

    def test_an_axis_counts_from_either_end(self):
        scale = torch.linspace(0.1, 1, 6)
        last = fake_quant(X, scale, quant_min=-8, quant_max=7, axis=-1)
        assert torch.equal(last, fake_quant(X, scale, quant_min=-8, quant_max=7, axis=1))
        for column in range(6):
            alone = fake_quant(X[:, column], scale[column], quant_min=-8, quant_max=7)
            assert torch.equal(last[:, column], alone)

    @pytest.mark.parametrize("given", ["input", "scale", "zero_point"])
    def test_each_argument_gets_its_gradient_alone(self, given):
        arguments = {"input": X.clone(), "scale": SCALE.clone(), "zero_point": torch.tensor([1.0])}
        arguments[given].requires_grad_()
        fake_quant(**arguments, quant_min=-2, quant_max=1).sum().backward()
        assert [name for name, value in arguments.items() if value.grad is not None] == [given]
        assert arguments[given].grad.abs().sum() > 0

    def test_gradients_have_the_dtypes_of_their_arguments(self):
        x = X.bfloat16().requires_grad_()
        scale = SCALE.double().requires_grad_()
        zero_point = torch.tensor([1.0], dtype=torch.float16, requires_grad=True)
        y = fake_quant(x, scale, zero_point, quant_min=-2, quant_max=1)
        y.sum().backward()
        assert y.dtype == torch.bfloat16
        assert (x.grad.dtype, scale.grad.dtype, zero_point.grad.dtype) == (
            torch.bfloat16,
            torch.float64,
            torch.float16,
        )


class TestMixedFakeQuant:
    def test_values(self):
        y = mixed_fake_quant(torch.tensor([0.3, 9.0]), **MIXTURE, **RANGES)
        torch.testing.assert_close(y, torch.tensor([0.4 * 0.5 + 0.6 * 0.25, 0.4 * 0.5 + 0.6 * 1.75]))

    def test_an_axis_counts_from_either_end(self):
        scales = torch.linspace(0.1, 1, 12).reshape(2, 6)
        last = mixed_fake_quant(X, scales, MIXTURE["probs"], **RANGES, axis=-1)
        assert torch.equal(last, mixed_fake_quant(X, scales, MIXTURE["probs"], **RANGES, axis=1))
        alone = mixed_fake_quant(X[:, 2], scales[:, 2], MIXTURE["probs"], **RANGES)
        assert torch.equal(last[:, 2], alone)

    @pytest.mark.parametrize("given", ["input", "scales", "probs"])
    def test_each_argument_gets_its_gradient_alone(self, given):
        arguments = {"input": X.clone(), **{name: value.clone() for name, value in MIXTURE.items()}}
        arguments[given].requires_grad_()
        mixed_fake_quant(**arguments, **RANGES).sum().backward()
        assert [name for name, value in arguments.items() if value.grad is not None] == [given]
        assert arguments[given].grad.abs().sum() > 0


_ONE = {"scale": SCALE, "quant_min": -8, "quant_max": 7}
_SEVERAL = {**MIXTURE, **RANGES}
_META = torch.ones(1, device="meta")
# What is wrong: the call, its error, and what the message must say.
_BAD = {
    "integer input": (lambda: fake_quant(X.int(), **_ONE), TypeError, "input has dtype torch.int32"),
    "complex input": (lambda: fake_quant(X + 1j, **_ONE), TypeError, "input has dtype torch.complex64"),
    "8-bit input": (
        lambda: fake_quant(X.to(torch.float8_e4m3fn), **_ONE),
        TypeError,
        "input has dtype torch.float8_e4m3fn; float32, bfloat16, float16 and float64 are supported",
    ),
    "integer scale": (
        lambda: fake_quant(X, **{**_ONE, "scale": SCALE.int()}),
        TypeError,
        "scale has dtype torch.int32",
    ),
    "integer zero point": (
        lambda: fake_quant(X, zero_point=SCALE.long(), **_ONE),
        TypeError,
        "zero_point has dtype torch.int64",
    ),
    "scale on another device": (
        lambda: fake_quant(X, **{**_ONE, "scale": _META}),
        ValueError,
        "scale is on meta but input is on cpu",
    ),
    "zero point on another device": (
        lambda: fake_quant(X, zero_point=_META, **_ONE),
        ValueError,
        "zero_point is on meta but input is on cpu",
    ),
    "axis too large": (
        lambda: fake_quant(X, **_ONE, axis=2),
        ValueError,
        "axis is 2, out of range for an input with 2 dim",
    ),
    "axis too small": (lambda: fake_quant(X, **_ONE, axis=-3), ValueError, "axis is -3, out of range"),
    "axis of a scalar": (lambda: fake_quant(X[0, 0], **_ONE, axis=0), ValueError, "axis is 0, out of range"),
    "several scales without an axis": (
        lambda: fake_quant(X, **{**_ONE, "scale": torch.ones(4)}),
        ValueError,
        r"scale has shape \(4,\); without an axis it must be \(1,\)",
    ),
    "scales of another axis": (
        lambda: fake_quant(X, **{**_ONE, "scale": torch.ones(4)}, axis=1),
        ValueError,
        r"scale has shape \(4,\); for axis 1 of an input of shape \(4, 6\) it must be \(6,\)",
    ),
    "zero points of another axis": (
        lambda: fake_quant(X, torch.ones(6), torch.ones(4), quant_min=-8, quant_max=7, axis=1),
        ValueError,
        r"zero_point has shape \(4,\)",
    ),
    "empty range": (
        lambda: fake_quant(X, SCALE, quant_min=7, quant_max=7),
        ValueError,
        "quant_min is 7, which is not below quant_max = 7",
    ),
    "range too wide": (
        lambda: fake_quant(X, SCALE, quant_min=-8, quant_max=2**16 + 1),
        ValueError,
        "quant_min = -8, quant_max = 65537",
    ),
    "integer input of a mixture": (
        lambda: mixed_fake_quant(X.int(), **_SEVERAL),
        TypeError,
        "input has dtype torch.int32",
    ),
    "integer probabilities": (
        lambda: mixed_fake_quant(X, **{**_SEVERAL, "probs": torch.ones(2).int()}),
        TypeError,
        "probs has dtype torch.int32",
    ),
    "scales on another device": (
        lambda: mixed_fake_quant(X, **{**_SEVERAL, "scales": torch.ones(2, device="meta")}),
        ValueError,
        "scales is on meta but input is on cpu",
    ),
    "no candidate": (
        lambda: mixed_fake_quant(X, **MIXTURE, quant_mins=[], quant_maxs=[]),
        ValueError,
        "quant_mins has 0 candidates; between 1 and 8",
    ),
    "too many candidates": (
        lambda: mixed_fake_quant(X, torch.ones(9), torch.ones(9), quant_mins=[-2] * 9, quant_maxs=[1] * 9),
        ValueError,
        "quant_mins has 9 candidates",
    ),
    "ranges of different lengths": (
        lambda: mixed_fake_quant(X, **MIXTURE, quant_mins=[-2, -8], quant_maxs=[1]),
        ValueError,
        "quant_maxs has 1 entries but quant_mins has 2",
    ),
    "an empty range among others": (
        lambda: mixed_fake_quant(X, **MIXTURE, quant_mins=[-2, 8], quant_maxs=[1, 7]),
        ValueError,
        r"quant_mins\[1\] is 8, which is not below quant_maxs\[1\] = 7",
    ),
    "a range too wide among others": (
        lambda: mixed_fake_quant(X, **MIXTURE, quant_mins=[-(2**17), -8], quant_maxs=[1, 7]),
        ValueError,
        r"quant_mins\[0\] = -131072",
    ),
    "too few scales": (
        lambda: mixed_fake_quant(X, torch.ones(1), MIXTURE["probs"], **RANGES),
        ValueError,
        r"scales has shape \(1,\); without an axis it must be \(2,\)",
    ),
    "scales without the channels": (
        lambda: mixed_fake_quant(X, **_SEVERAL, axis=0),
        ValueError,
        r"scales has shape \(2,\); for axis 0 of an input of shape \(4, 6\) it must be \(2, 4\)",
    ),
    "too many probabilities": (
        lambda: mixed_fake_quant(X, MIXTURE["scales"], torch.ones(3), **RANGES),
        ValueError,
        r"probs has shape \(3,\); without an axis it must be \(2,\)",
    ),
    "integer zero points of a mixture": (
        lambda: mixed_fake_quant(X, **_SEVERAL, zero_points=torch.zeros(2).long()),
        TypeError,
        "zero_points has dtype torch.int64",
    ),
    "zero points of a mixture on another device": (
        lambda: mixed_fake_quant(X, **_SEVERAL, zero_points=torch.zeros(2, device="meta")),
        ValueError,
        "zero_points is on meta but input is on cpu",
    ),
    "zero points without the channels": (
        lambda: mixed_fake_quant(X, torch.ones(2, 6), MIXTURE["probs"], torch.zeros(2), **RANGES, axis=1),
        ValueError,
        r"zero_points has shape \(2,\); for axis 1 of an input of shape \(4, 6\) it must be \(2, 6\)",
    ),
    "groups that do not divide": (
        lambda: fake_quant(X, torch.ones(4, 1), quant_min=-8, quant_max=7, group_size=4),
        ValueError,
        "group_size is 4, which does not divide the last dimension of input, 6",
    ),
    "groups of a mixture that do not divide": (
        lambda: mixed_fake_quant(X, torch.ones(2, 4, 1), MIXTURE["probs"], **RANGES, group_size=5),
        ValueError,
        "group_size is 5, which does not divide the last dimension of input, 6",
    ),
    "scales of other groups": (
        lambda: fake_quant(X, torch.ones(4, 3), quant_min=-8, quant_max=7, group_size=3),
        ValueError,
        r"scale has shape \(4, 3\); for the groups of an input of shape \(4, 6\) it must be \(4, 2\)",
    ),
    "zero points of other groups": (
        lambda: mixed_fake_quant(X, torch.ones(2, 4, 2), MIXTURE["probs"], torch.ones(2, 4, 1), **RANGES, group_size=3),
        ValueError,
        r"zero_points has shape \(2, 4, 1\); for the groups of an input of shape \(4, 6\) it must be \(2, 4, 2\)",
    ),
    "complex scale": (
        lambda: fake_quant(X, **{**_ONE, "scale": SCALE + 1j}),
        TypeError,
        "scale has dtype torch.complex64; a real floating-point tensor is needed",
    ),
    "probabilities on another device": (
        lambda: mixed_fake_quant(X, **{**_SEVERAL, "probs": torch.ones(2, device="meta")}),
        ValueError,
        "probs is on meta but input is on cpu",
    ),
    "input on another device": (
        lambda: fake_quant(X.to("meta"), **_ONE),
        ValueError,
        "scale is on cpu but input is on meta",
    ),
    "axis of a mixture": (lambda: mixed_fake_quant(X, **_SEVERAL, axis=5), ValueError, "axis is 5, out of range"),
    "a bool in place of an integer": (
        lambda: fake_quant(X, SCALE, quant_min=-8, quant_max=True),
        TypeError,
        "quant_max is True, of type bool; an integer is needed",
    ),
    "one integer for all candidates": (
        lambda: mixed_fake_quant(X, **MIXTURE, quant_mins=-8, quant_maxs=[1, 7]),
        TypeError,
        "quant_mins is -8, of type int; integers are needed",
    ),
}


_CALLS = {
    "fake_quant": (fake_quant, {"input": X, "zero_point": SCALE, **_ONE}),
    "fake_quant, groups": (
        fake_quant,
        {"input": X, **_ONE, "scale": torch.ones(4, 2), "zero_point": torch.ones(4, 2), "group_size": 3},
    ),
    "mixed_fake_quant": (mixed_fake_quant, {"input": X, "zero_points": torch.ones(2), **_SEVERAL}),
}
# Given in place of a tensor, and what is said of it.
_NO_TENSORS = {
    "number": (lambda tensor: 0.5, r"is 0\.5, of type float; a tensor is needed"),
    "None": (lambda tensor: None, "is None, of type NoneType; a tensor is needed"),
    "list": (lambda tensor: tensor.tolist(), r"is \[.*, of type list; a tensor is needed"),
    "array": (lambda tensor: tensor.numpy(), r"is array\([\s\S]*, of type ndarray; a tensor is needed"),
    "dtype": (lambda tensor: torch.float32, "is torch.float32, of type dtype; a tensor is needed"),
    "sparse": (lambda tensor: tensor.to_sparse(), "has layout torch.sparse_coo; a dense tensor is needed"),
    "mkldnn": (lambda tensor: tensor.to_mkldnn(), "has layout torch._mkldnn; a dense tensor is needed"),
    "jagged": (
        lambda tensor: torch.nested.nested_tensor([tensor], layout=torch.jagged),
        "is a nested tensor; a dense tensor is needed",
    ),
    "lazy": (lambda tensor: torch.nn.UninitializedParameter(), "is an uninitialized parameter; run one batch"),
}


@per_backend
@pytest.mark.parametrize(("call", "error", "message"), _BAD.values(), ids=_BAD)
def test_bad_arguments_are_named(call, error, message, name):
    with backend(name), pytest.raises(error, match=message):
        call()


@per_backend
@pytest.mark.parametrize(("instead", "message"), _NO_TENSORS.values(), ids=_NO_TENSORS)
@pytest.mark.parametrize(("function", "arguments"), _CALLS.values(), ids=_CALLS)
def test_what_is_no_dense_tensor_is_named(function, arguments, instead, message, name):
    for argument, value in arguments.items():
        if isinstance(value, Tensor) and not (argument.startswith("zero_point") and instead(value) is None):
            with backend(name), pytest.raises(TypeError, match=f"^{argument} {message}"):
                function(**{**arguments, argument: instead(value)})


@per_backend
def test_a_sparse_gradient_is_named(name, monkeypatch):
    (weight,) = _needs_grad(X)
    monkeypatch.setattr(backends, "_announced", {"cpu"} if backends.unavailable("cpu") else set())
    with backend(name), warnings.catch_warnings():
        warnings.simplefilter("error")  # such as one of missing kernels
        quantized = fake_quant(weight, SCALE, quant_min=-8, quant_max=7)
        rows = torch.nn.functional.embedding(torch.tensor([1, 2]), quantized, sparse=True)
        with pytest.raises(RuntimeError, match=r"grad has layout torch\.sparse_coo; a dense tensor is needed"):
            rows.sum().backward()


# Calls that pass by the checks above. The arguments, and what is wrong with them.
_MIXTURE = (MIXTURE["scales"], MIXTURE["probs"], None, RANGES["quant_mins"], RANGES["quant_maxs"])
_DIRECT = {
    "scale too short": (ops.fake_quant, (X, SCALE, None, -8, 7, 1), "scale has 1 elements, but 6 are needed"),
    "scale too long": (ops.fake_quant, (X, torch.ones(4), None, -8, 7, None), "scale has 4 elements, but 1 are"),
    "zero point too short": (ops.fake_quant, (X, torch.ones(6), SCALE, -8, 7, 1), "zero_point has 1 elements, but 6"),
    "axis too large": (ops.fake_quant, (X, SCALE, None, -8, 7, 2), "axis is 2, but input has 2 dimensions"),
    "axis from the end": (ops.fake_quant, (X, torch.ones(6), None, -8, 7, -1), "axis is -1, but input has 2"),
    "integer input": (ops.fake_quant, (X.int(), SCALE, None, -8, 7, None), "input has dtype"),
    "complex input": (ops.fake_quant, (X + 0j, SCALE, None, -8, 7, None), "input has dtype"),
    "scale on another device": (ops.fake_quant, (X, _META, None, -8, 7, None), "scale is on meta but input is on cpu"),
    "gradient of another shape": (
        ops.fake_quant_backward,
        (X[0], X, SCALE, None, -8, 7, None),
        "grad does not have the shape of input",
    ),
    "gradient on another device": (
        ops.fake_quant_backward,
        (X.to("meta"), X, SCALE, None, -8, 7, None),
        "grad is on meta but input is on cpu",
    ),
    "scale too short, backward": (ops.fake_quant_backward, (X, X, SCALE, None, -8, 7, 0), "scale has 1 elements"),
    "scales of fewer candidates": (
        ops.mixed_fake_quant,
        (X, SCALE, *_MIXTURE[1:], None),
        "scales has 1 elements, but 2 are needed",
    ),
    "scales without the channels": (ops.mixed_fake_quant, (X, *_MIXTURE, 0), "scales has 2 elements, but 8 are"),
    "too few probabilities": (
        ops.mixed_fake_quant,
        (X, _MIXTURE[0], SCALE, *_MIXTURE[2:], None),
        "probs has 1 elements, but 2 are needed",
    ),
    "too few zero points": (
        ops.mixed_fake_quant,
        (X, *_MIXTURE[:2], SCALE, *_MIXTURE[3:], None),
        "zero_points has 1 elements, but 2 are needed",
    ),
    "ranges of different lengths": (
        ops.mixed_fake_quant,
        (X, *_MIXTURE[:4], [1], None),
        "quant_maxs has 1 entries but quant_mins has 2",
    ),
    "no candidate": (ops.mixed_fake_quant, (X, *_MIXTURE[:3], [], [], None), "quant_mins has 0 candidates"),
    "too many candidates": (
        ops.mixed_fake_quant,
        (X, torch.ones(9), torch.ones(9), None, [-2] * 9, [1] * 9, None),
        "quant_mins has 9 candidates; between 1 and 8 are supported",
    ),
    "axis of a mixture": (ops.mixed_fake_quant, (X, *_MIXTURE, 7), "axis is 7, but input has 2 dimensions"),
    "gradient of a mixture": (
        ops.mixed_fake_quant_backward,
        (X[:, :5], X, *_MIXTURE, None),
        "grad does not have the shape of input",
    ),
    "too few zero points, backward": (
        ops.mixed_fake_quant_backward,
        (X, X, *_MIXTURE[:2], SCALE, *_MIXTURE[3:], None),
        "zero_points has 1 elements, but 2 are needed",
    ),
    "probabilities on another device, backward": (
        ops.mixed_fake_quant_backward,
        (X, X, _MIXTURE[0], torch.ones(2, device="meta"), *_MIXTURE[2:], None),
        "probs is on meta but input is on cpu",
    ),
}


@pytest.mark.parametrize("name", [*per_backend.args[1], *(["triton"] if _interpreted else [])])
@pytest.mark.parametrize(("op", "arguments", "message"), _DIRECT.values(), ids=_DIRECT)
def test_direct_calls_that_do_not_fit_are_refused(op, arguments, message, name):
    with backend(name), pytest.raises(RuntimeError, match=message):
        op(*arguments)


@pytest.mark.parametrize(
    "settings", [{"quant_min": -7.0, "quant_max": 6}, {"quant_min": -7, "quant_max": 6, "axis": 1.0}], ids=str
)
def test_a_float_in_place_of_an_integer_is_named_and_leaves_no_trace(settings):
    scale = torch.ones(6) if "axis" in settings else SCALE
    with pytest.raises(TypeError, match="of type float; an integer is needed"):
        fake_quant(X, scale, **settings)
    fake_quant(X, scale, **{name: int(value) for name, value in settings.items()})
    with pytest.raises(TypeError, match=r"quant_mins\[1\] is -8.0, of type float"):
        mixed_fake_quant(X, **MIXTURE, quant_mins=[-2, -8.0], quant_maxs=[1, 7])
    mixed_fake_quant(X, **MIXTURE, **RANGES)
    with pytest.raises(TypeError, match=r"group_size is 3\.0"):
        fake_quant(X, torch.ones(4, 2), quant_min=-8, quant_max=7, group_size=3.0)


def test_integers_of_numpy_are_integers():
    low, high = np.int64(-8), np.int32(7)
    wanted = fake_quant(X, SCALE, quant_min=-8, quant_max=7)
    assert torch.equal(fake_quant(X, SCALE, quant_min=low, quant_max=high), wanted)
    found = mixed_fake_quant(X, **MIXTURE, quant_mins=np.array([-2, -8]), quant_maxs=np.array([1, 7]))
    assert torch.equal(found, mixed_fake_quant(X, **MIXTURE, **RANGES))


@per_backend
def test_vectorized_autograd_equals_row_after_row(name):
    def one(x, scale):
        return fake_quant(x, scale, quant_min=-8, quant_max=7, axis=1)

    def several(x, scales, probs):
        return mixed_fake_quant(x, scales, probs, **RANGES, axis=1)

    calls = ((one, (X, _CHANNEL_SCALE)), (several, (X, _CHANNEL_SCALES.contiguous(), MIXTURE["probs"])))
    with backend(name):
        for function, arguments in calls:
            rows = torch.autograd.functional.jacobian(function, arguments)
            together = torch.autograd.functional.jacobian(function, arguments, vectorize=True)
            assert all(map(torch.equal, rows, together))


@per_backend
def test_hooks_may_bring_saved_tensors_back_in_another_dtype(name):
    x, scale = _needs_grad(X, _CHANNEL_SCALE)
    with (
        backend(name),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.half() if t.dim() == 1 else t),
    ):
        output = fake_quant(x, scale, quant_min=-8, quant_max=7, axis=1)
        _, found = torch.autograd.grad(output.sum(), (x, scale))
    output = fake_quant(x, scale, quant_min=-8, quant_max=7, axis=1)
    _, wanted = torch.autograd.grad(output.sum(), (x, scale))
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)  # half a scale's precision moves x / s


@per_backend
@pytest.mark.parametrize("back", [torch.float32, torch.float16], ids=str)
def test_hooks_may_bring_the_input_back_in_another_dtype(back, name):
    """As offloading or compressing saved tensors may: the values are read in the dtype that they have by then."""
    x, scale = _needs_grad(X.bfloat16(), _CHANNEL_SCALE)
    with (
        backend(name),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.to(back) if t.dim() == 2 else t),
    ):
        output = fake_quant(x, scale, quant_min=-8, quant_max=7, axis=1)
        found = torch.autograd.grad(output.sum(), (x, scale))
    output = fake_quant(x, scale, quant_min=-8, quant_max=7, axis=1)
    for actual, wanted in zip(found, torch.autograd.grad(output.sum(), (x, scale)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2, check_dtype=False)


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="no CPU kernels here")
def test_parameters_in_16_bits_go_through_the_dispatcher(calls_past_the_dispatcher):
    x, scale = _needs_grad(X.bfloat16(), _CHANNEL_SCALE.bfloat16())
    with backend("cpu"), calls_past_the_dispatcher() as calls:
        output = fake_quant(x, scale, quant_min=-8, quant_max=7, axis=1)
        found = torch.autograd.grad(output.sum(), (x, scale))
    assert calls == []
    assert [t.dtype for t in found] == [torch.bfloat16] * 2


@per_backend
@pytest.mark.parametrize("which", [0, 1], ids=["input", "scale"])
def test_memory_that_shrinks_before_backward_is_refused(which, name):
    """As sharded training frees a parameter: it sets `data`, of which autograd's count of versions knows nothing."""
    tensors = _needs_grad(X, _CHANNEL_SCALE)
    with backend(name):
        output = fake_quant(*tensors, quant_min=-8, quant_max=7, axis=1).sum()
        tensors[which].data = torch.empty(1) if which else torch.empty(1, 6)
        with pytest.raises(RuntimeError, match=r"scale has 1 elements, but \d+ are needed|shape of input"):
            output.backward()


def _needs_grad(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors]


_CHANNEL_SCALE = torch.linspace(0.1, 1, 6)
# A transposed input and scales in another memory order: strides are part of what a fake promises.
_CHANNEL_SCALES = torch.linspace(0.1, 1, 12).reshape(6, 2).t()
_GROUP_SCALES = torch.linspace(0.1, 1, 16).reshape(2, 8)
_ONE_SETTINGS = (-8, 7)
_SEVERAL_SETTINGS = (RANGES["quant_mins"], RANGES["quant_maxs"])
_OPCHECKS = {
    "fake_quant": (ops.fake_quant, (*_needs_grad(X, SCALE, None), *_ONE_SETTINGS, None)),
    "fake_quant, channels and zero point": (
        ops.fake_quant,
        (*_needs_grad(X, _CHANNEL_SCALE, _CHANNEL_SCALE), *_ONE_SETTINGS, 1),
    ),
    "fake_quant, transposed": (ops.fake_quant, (X.t(), _CHANNEL_SCALE, None, *_ONE_SETTINGS, 0)),
    "fake_quant_backward": (ops.fake_quant_backward, (X, X, SCALE, None, *_ONE_SETTINGS, None)),
    "fake_quant_backward, channels and zero point": (
        ops.fake_quant_backward,
        (X.t(), X.t(), _CHANNEL_SCALE, _CHANNEL_SCALE, *_ONE_SETTINGS, 0),
    ),
    "mixed_fake_quant": (
        ops.mixed_fake_quant,
        (*_needs_grad(X, MIXTURE["scales"], MIXTURE["probs"]), None, *_SEVERAL_SETTINGS, None),
    ),
    "mixed_fake_quant, channels": (
        ops.mixed_fake_quant,
        (*_needs_grad(X, _CHANNEL_SCALES, MIXTURE["probs"]), None, *_SEVERAL_SETTINGS, 1),
    ),
    "mixed_fake_quant_backward": (
        ops.mixed_fake_quant_backward,
        (X, X, MIXTURE["scales"], MIXTURE["probs"], None, *_SEVERAL_SETTINGS, None),
    ),
    "mixed_fake_quant_backward, channels": (
        ops.mixed_fake_quant_backward,
        (X, X, _CHANNEL_SCALES, MIXTURE["probs"], None, *_SEVERAL_SETTINGS, 1),
    ),
    "mixed_fake_quant, zero points": (
        ops.mixed_fake_quant,
        (*_needs_grad(X, _CHANNEL_SCALES, MIXTURE["probs"], 4 * _CHANNEL_SCALES), *_SEVERAL_SETTINGS, 1),
    ),
    "mixed_fake_quant_backward, zero points": (
        ops.mixed_fake_quant_backward,
        (X, X, _CHANNEL_SCALES, MIXTURE["probs"], 4 * _CHANNEL_SCALES, *_SEVERAL_SETTINGS, 1),
    ),
    # As the public functions call the operators for groups of three.
    "fake_quant, groups": (
        ops.fake_quant,
        (*_needs_grad(X.reshape(-1, 3), _GROUP_SCALES[0], 4 * _GROUP_SCALES[1]), *_ONE_SETTINGS, 0),
    ),
    "mixed_fake_quant, groups": (
        ops.mixed_fake_quant,
        (*_needs_grad(X.reshape(-1, 3), _GROUP_SCALES, MIXTURE["probs"], 4 * _GROUP_SCALES), *_SEVERAL_SETTINGS, 0),
    ),
    "fake_quant, nothing": (ops.fake_quant, (*_needs_grad(X[:0], SCALE, SCALE), *_ONE_SETTINGS, None)),
    "mixed_fake_quant, nothing": (
        ops.mixed_fake_quant,
        (*_needs_grad(X[:0], MIXTURE["scales"], MIXTURE["probs"], None), *_SEVERAL_SETTINGS, None),
    ),
}


@per_backend
@pytest.mark.parametrize(("op", "arguments"), _OPCHECKS.values(), ids=_OPCHECKS)
def test_opcheck(op, arguments, name):
    with backend(name):
        torch.library.opcheck(op.default, arguments)


class Quantizer(torch.nn.Module):
    """Both operators, one feeding the other, with every kind of parameter."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(_CHANNEL_SCALE.clone())
        self.zero_point = torch.nn.Parameter(torch.linspace(-1, 1, 6))
        self.scales = torch.nn.Parameter(MIXTURE["scales"].clone())
        self.probs = torch.nn.Parameter(MIXTURE["probs"].clone())
        self.zero_points = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.weight = torch.nn.Parameter(X.clone())
        self.group_scale = torch.nn.Parameter(_GROUP_SCALES[0].reshape(4, 2).clone())
        self.group_scales = torch.nn.Parameter(_GROUP_SCALES.reshape(2, 4, 2).clone())

    def forward(self, x: Tensor) -> Tensor:
        x = fake_quant(x, self.scale, self.zero_point, quant_min=-8, quant_max=7, axis=-1)
        x = mixed_fake_quant(x, self.scales, self.probs, self.zero_points, **RANGES)
        weight = fake_quant(self.weight, self.group_scale, quant_min=-8, quant_max=7, group_size=3)
        weight = mixed_fake_quant(weight, self.group_scales, self.probs, **RANGES, group_size=3)
        return torch.nn.functional.linear(x, weight)


def _gradients(module: torch.nn.Module, run, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    run(x).square().sum().backward()
    return [x.grad, *(parameter.grad.clone() for parameter in module.parameters())]


class TestTorch:
    def test_compiles_into_one_graph_with_the_same_results(self):
        module = Quantizer()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(X), module(X))
        for actual, expected in zip(_gradients(module, compiled, X), _gradients(module, module, X), strict=True):
            assert torch.equal(actual, expected)

    def test_compiles_once_for_all_batch_sizes(self):
        module = Quantizer()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (4, 3, 2):
            with torch.compiler.set_stance("default" if rows == 4 else "fail_on_recompile"):
                assert torch.equal(compiled(X[:rows]), module(X[:rows]))

    def test_exports(self):
        module = Quantizer()
        batch = torch.export.Dim("batch", min=2)
        exported = torch.export.export(module, (X,), dynamic_shapes=({0: batch},))
        targets = {str(node.target) for node in exported.graph.nodes}
        assert {"asga.fake_quant.default", "asga.mixed_fake_quant.default"} <= targets
        assert torch.equal(exported.module()(X[:3]), module(X[:3]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_leaves_the_dtype_alone(self, dtype):
        with torch.autocast("cpu", dtype):
            assert (X @ X.t()).dtype == dtype
            one = fake_quant(X, SCALE, quant_min=-8, quant_max=7)
            mixture = mixed_fake_quant(X.double(), **MIXTURE, **RANGES)
            low = fake_quant(X.to(dtype), SCALE, quant_min=-8, quant_max=7)
        assert (one.dtype, mixture.dtype, low.dtype) == (torch.float32, torch.float64, dtype)
        assert torch.equal(one, fake_quant(X, SCALE, quant_min=-8, quant_max=7))

    @per_backend
    @pytest.mark.parametrize("given", ["input", "scale"])
    def test_a_second_derivative_is_refused(self, given, name):
        arguments = {"input": X.clone(), "scale": SCALE.clone()}
        value = arguments[given].requires_grad_()
        several = {"scales": MIXTURE["scales"].clone(), "probs": MIXTURE["probs"].clone().requires_grad_()}
        with backend(name):
            one = fake_quant(**arguments, quant_min=-8, quant_max=7).square().sum()
            mixture = mixed_fake_quant(X, **several, **RANGES).square().sum()
            for loss, leaf in ((one, value), (mixture, several["probs"])):
                (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
                with pytest.raises(RuntimeError, match="asga quantizers have no second derivative"):
                    grad.sum().backward()

    @per_backend
    def test_keeps_the_input_and_nothing_else_of_its_size_for_backward(self, name):
        saved = []
        with (
            backend(name),
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t),
        ):
            x, scales, probs = _needs_grad(X, MIXTURE["scales"], MIXTURE["probs"])
            mixed_fake_quant(x, scales, probs, **RANGES)
        assert saved == [x.data_ptr(), scales.data_ptr(), probs.data_ptr()]


# Name: a function of the tensors it is differentiated by, and these.
_TRANSFORMED = {
    "fake_quant": (
        lambda x, s, z: fake_quant(x, s, z, quant_min=-8, quant_max=7, axis=-1).square().sum(),
        (X, _CHANNEL_SCALE, 4 * _CHANNEL_SCALE),
    ),
    "fake_quant, groups": (
        lambda x, s: fake_quant(x, s, quant_min=-8, quant_max=7, group_size=3).square().sum(),
        (X, _GROUP_SCALES[0].reshape(4, 2)),
    ),
    "mixed_fake_quant": (
        lambda x, s, p, z: mixed_fake_quant(x, s, p, z, **RANGES).square().sum(),
        (X, MIXTURE["scales"], MIXTURE["probs"], torch.tensor([1.0, -2.0])),
    ),
}


@per_backend
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap without a rule of our own is a loop
@pytest.mark.parametrize(("function", "tensors"), _TRANSFORMED.values(), ids=_TRANSFORMED)
class TestFunctionTransforms:
    def test_grad_and_vjp_are_those_of_autograd(self, function, tensors, name):
        leaves = _needs_grad(*tensors)
        with backend(name):
            expected = torch.autograd.grad(function(*leaves), leaves)
            every = tuple(range(len(tensors)))
            assert all(map(torch.equal, torch.func.grad(function, argnums=every)(*tensors), expected))
            _, pull = torch.func.vjp(function, *tensors)
            assert all(map(torch.equal, pull(torch.tensor(1.0)), expected))

    def test_vmap_is_the_loop_or_says_that_it_is_not_there(self, function, tensors, name):
        several = torch.stack([X, 2 * X, X - 1])
        with backend(name):
            expected = torch.stack([function(x, *tensors[1:]) for x in several])
            assert _is_or_is_refused(lambda: torch.func.vmap(lambda x: function(x, *tensors[1:]))(several), expected)

    def test_vmap_of_grad_is_the_loop_or_says_that_it_is_not_there(self, function, tensors, name):
        several = torch.stack([X, 2 * X, X - 1])
        with backend(name):
            leaf = several.clone().requires_grad_()
            (expected,) = torch.autograd.grad(sum(function(x, *tensors[1:]) for x in leaf), leaf)
            gradient = torch.func.grad(lambda x: function(x, *tensors[1:]))
            assert _is_or_is_refused(lambda: torch.func.vmap(gradient)(several), expected)

    def test_forward_mode_is_right_or_refused_but_never_zero(self, function, tensors, name):
        with backend(name):
            leaf = X.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(function(leaf, *tensors[1:]), leaf)
            expected = (gradient * X).sum()
            assert _is_or_is_refused(
                lambda: torch.func.jvp(lambda x: function(x, *tensors[1:]), (X,), (X,))[1], expected
            )


def _is_or_is_refused(call, expected: Tensor) -> bool:
    """Either the right values, or an error that names the transform."""
    try:
        found = call()
    except (RuntimeError, NotImplementedError) as error:
        # What torch says of any function that is not prepared for transforms helps nobody.
        message = str(error)
        return "setup_context" not in message and any(word in message for word in ("vmap", "jvp", "forward"))
    torch.testing.assert_close(found, expected)
    return True
