"""The gradients of the operators for eager mode, with about half the overhead of those registered in `library`.

On tensors the size of a layer's weight the call, not the kernel, is what takes time. A compiled or exported graph
holds the operators themselves and differentiates them by the registered formulas; both call the same kernels.
"""

import torch
from torch import Tensor


class FakeQuant(torch.autograd.Function):
    """`torch.ops.asga.fake_quant` with its gradients."""

    @staticmethod
    def forward(
        ctx, input: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, axis: int | None
    ) -> Tensor:
        """Keep the arguments and run the operator."""
        ctx.save_for_backward(input, scale, zero_point)
        ctx.settings = (quant_min, quant_max, axis)
        return torch.ops.asga.fake_quant.default(input, scale, zero_point, quant_min, quant_max, axis)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments, in one sweep."""
        input, scale, zero_point = ctx.saved_tensors
        grads = torch.ops.asga.fake_quant_backward.default(grad, input, scale, zero_point, *ctx.settings)
        return grads[0], grads[1], (None if zero_point is None else grads[2]), None, None, None


class MixedFakeQuant(torch.autograd.Function):
    """`torch.ops.asga.mixed_fake_quant` with its gradients."""

    @staticmethod
    def forward(
        ctx,
        input: Tensor,
        scales: Tensor,
        probs: Tensor,
        zero_points: Tensor | None,
        quant_mins: list[int],
        quant_maxs: list[int],
        axis: int | None,
    ) -> Tensor:
        """Keep the arguments and run the operator."""
        ctx.save_for_backward(input, scales, probs, zero_points)
        ctx.settings = (quant_mins, quant_maxs, axis)
        return torch.ops.asga.mixed_fake_quant.default(input, scales, probs, zero_points, quant_mins, quant_maxs, axis)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments, in one sweep."""
        input, scales, probs, zero_points = ctx.saved_tensors
        grads = torch.ops.asga.mixed_fake_quant_backward.default(grad, input, scales, probs, zero_points, *ctx.settings)
        return *grads[:3], (None if zero_points is None else grads[3]), None, None, None


def plain_eager() -> bool:
    """Whether nothing but eager autograd looks at the operators: no tracing and no `torch.func` transform."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None
