"""Schemas, fakes and autograd of the operators, once for all backends.

Everything is defined from Python so that an installation without a compiler still has every operator;
`asga.ops.backends` attaches the kernels.
"""

import torch
from torch import Tensor

OPERATORS = ("fake_quant", "fake_quant_backward", "mixed_fake_quant", "mixed_fake_quant_backward")

library = torch.library.Library("asga", "DEF")
library.define(
    "fake_quant(Tensor input, Tensor scale, Tensor? zero_point, int quant_min, int quant_max, int? axis) -> Tensor"
)
library.define(
    "fake_quant_backward(Tensor grad, Tensor input, Tensor scale, Tensor? zero_point, int quant_min, "
    "int quant_max, int? axis) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "mixed_fake_quant(Tensor input, Tensor scales, Tensor probs, Tensor? zero_points, int[] quant_mins, "
    "int[] quant_maxs, int? axis) -> Tensor"
)
library.define(
    "mixed_fake_quant_backward(Tensor grad, Tensor input, Tensor scales, Tensor probs, Tensor? zero_points, "
    "int[] quant_mins, int[] quant_maxs, int? axis) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _check_devices(input: Tensor, **others: Tensor | None) -> None:
    """Fakes also serve direct calls with meta tensors, and would return memory that nobody wrote to."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(f"{name} is on {tensor.device} but input is on {input.device}")


@torch.library.register_fake("asga::fake_quant", lib=library)
def _(input, scale, zero_point, quant_min, quant_max, axis):
    _check_devices(input, scale=scale, zero_point=zero_point)
    return torch.empty_like(input)


@torch.library.register_fake("asga::fake_quant_backward", lib=library)
def _(grad, input, scale, zero_point, quant_min, quant_max, axis):
    _check_devices(input, grad=grad, scale=scale, zero_point=zero_point)
    grad_zero_point = scale.new_empty(0) if zero_point is None else torch.empty_like(zero_point)
    return torch.empty_like(input), torch.empty_like(scale), grad_zero_point


@torch.library.register_fake("asga::mixed_fake_quant", lib=library)
def _(input, scales, probs, zero_points, quant_mins, quant_maxs, axis):
    _check_devices(input, scales=scales, probs=probs, zero_points=zero_points)
    return torch.empty_like(input)


@torch.library.register_fake("asga::mixed_fake_quant_backward", lib=library)
def _(grad, input, scales, probs, zero_points, quant_mins, quant_maxs, axis):
    _check_devices(input, grad=grad, scales=scales, probs=probs, zero_points=zero_points)
    grad_zero_points = scales.new_empty(0) if zero_points is None else torch.empty_like(zero_points)
    return torch.empty_like(input), torch.empty_like(scales), torch.empty_like(probs), grad_zero_points


def _fake_quant_context(ctx, inputs, output) -> None:
    input, scale, zero_point, *ctx.settings = inputs
    ctx.save_for_backward(input, scale, zero_point)


def _fake_quant_grad(ctx, grad: Tensor):
    input, scale, zero_point = ctx.saved_tensors
    grads = torch.ops.asga.fake_quant_backward(grad, input, scale, zero_point, *ctx.settings)
    return grads[0], grads[1], (None if zero_point is None else grads[2]), None, None, None


def _mixed_fake_quant_context(ctx, inputs, output) -> None:
    input, scales, probs, zero_points, *ctx.settings = inputs
    ctx.save_for_backward(input, scales, probs, zero_points)


def _mixed_fake_quant_grad(ctx, grad: Tensor):
    *tensors, zero_points = ctx.saved_tensors
    grads = torch.ops.asga.mixed_fake_quant_backward(grad, *tensors, zero_points, *ctx.settings)
    return *grads[:3], (None if zero_points is None else grads[3]), None, None, None


def no_second_derivative(ctx, *grads: Tensor):
    """The backward of a backward."""
    raise RuntimeError(
        "asga quantizers have no second derivative: the straight-through gradient is piecewise constant. "
        "Use create_graph=False, or finite differences of the gradient for curvature."
    )


torch.library.register_autograd("asga::fake_quant", _fake_quant_grad, setup_context=_fake_quant_context, lib=library)
torch.library.register_autograd(
    "asga::mixed_fake_quant", _mixed_fake_quant_grad, setup_context=_mixed_fake_quant_context, lib=library
)
for _name in ("fake_quant_backward", "mixed_fake_quant_backward"):
    torch.library.register_autograd(f"asga::{_name}", no_second_derivative, lib=library)
del _name
