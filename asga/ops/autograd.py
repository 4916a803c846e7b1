"""The gradients of the operators for eager mode, with a fraction of the overhead of those registered in `library`.

On tensors the size of a layer's weight the call, not the kernel, is what takes time. A compiled or exported graph
holds the operators themselves and differentiates them by the registered formulas; both call the same kernels.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from asga.ops import direct


@cache
def fake_quant_function(quant_min: int, quant_max: int, axis: int | None) -> Callable[..., Tensor]:
    """`torch.ops.asga.fake_quant` of ``(input, scale[, zero_point])``, with its gradients.

    A function of its own for each setting: on every argument that is no tensor, autograd spends microseconds.
    """
    ranges = (quant_min, quant_max)

    class FakeQuant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
            given = (input, scale) if zero_point is None else (input, scale, zero_point)
            ctx.save_for_backward(*given)
            ctx.layout = direct.layout(1, axis, *given)
            if ctx.layout is not None:
                ctx.counts = _counts(given)
                return direct.fake_quant(ctx.layout, input, scale, zero_point, *ranges)
            with _below_autograd():
                return torch.ops.asga.fake_quant.default(input, scale, zero_point, *ranges, axis)

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
            saved = ctx.saved_tensors
            arguments = (grad, *saved) if len(saved) == 3 else (grad, *saved, None)
            if _directly(ctx, grad, saved):
                grads = direct.fake_quant_backward(ctx.layout, *arguments, *ranges)
            else:
                grads = torch.ops.asga.fake_quant_backward.default(*arguments, *ranges, axis)
            return grads[: len(saved)]

    return apply_of(FakeQuant)


@cache
def mixed_fake_quant_function(
    quant_mins: tuple[int, ...], quant_maxs: tuple[int, ...], axis: int | None
) -> Callable[..., Tensor]:
    """`torch.ops.asga.mixed_fake_quant` of ``(input, scales, probs[, zero_points])``; see `fake_quant_function`."""
    ranges = (quant_mins, quant_maxs)

    class MixedFakeQuant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input: Tensor, scales: Tensor, probs: Tensor, zero_points: Tensor | None = None) -> Tensor:
            given = (input, scales, probs) if zero_points is None else (input, scales, probs, zero_points)
            ctx.save_for_backward(*given)
            ctx.layout = direct.layout(len(quant_mins), axis, *given)
            if ctx.layout is not None:
                ctx.counts = _counts(given)
                return direct.mixed_fake_quant(ctx.layout, input, scales, probs, zero_points, *ranges)
            with _below_autograd():
                return torch.ops.asga.mixed_fake_quant.default(input, scales, probs, zero_points, *ranges, axis)

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
            saved = ctx.saved_tensors
            arguments = (grad, *saved) if len(saved) == 4 else (grad, *saved, None)
            if _directly(ctx, grad, saved):
                grads = direct.mixed_fake_quant_backward(ctx.layout, *arguments, *ranges)
            else:
                grads = torch.ops.asga.mixed_fake_quant_backward.default(*arguments, *ranges, axis)
            return grads[: len(saved)]

    return apply_of(MixedFakeQuant)


# The operators' own formulas would be looked at, at the cost of a sweep over 4,096 values.
_below_autograd = torch._C._AutoDispatchBelowAutograd


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """``function.apply`` without the layer in Python that looks for `torch.func` and inspects signatures.

    Not for use under a transform of `torch.func`, or while compiling.
    """
    return super(torch.autograd.Function, function).apply


def _directly(ctx, grad: Tensor, saved: tuple[Tensor, ...]) -> bool:
    """Whether backward goes past the dispatcher, as forward did.

    Not with create_graph=True: the operator then says that there is no second derivative. Not under vectorized
    autograd, whose batches of gradients have no memory of their own. And not if hooks on saved tensors have brought
    back something else, or `tensor.data` is another one by now: the operator refuses a size that does not fit.
    """
    return (
        ctx.layout is not None
        and not torch.is_grad_enabled()
        and not torch._C._functorch.is_legacy_batchedtensor(grad)
        and direct.fits(ctx.layout, grad, *saved)
        and _counts(saved) == ctx.counts
    )


def _counts(tensors: tuple[Tensor, ...]) -> list[int]:
    return [tensor.numel() for tensor in tensors]
