"""The operators under `torch.func`: grad, vjp, vmap and what is made of them.

The formulas that `library` registers become an `autograd.Function` of a kind that function transforms refuse, so under
a transform the operators run through the functions below. They call each other rather than the operators, because a
transform differentiates with ``create_graph=True`` and so looks at the backward as well.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from asga.ops.library import no_second_derivative


def transforming() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def transformable(name: str, tensors: int) -> Callable[..., Tensor]:
    """An operator that `torch.func` can transform.

    Args:
        name: Of the operator.
        tensors: How many of its first arguments are tensors; the last of them may be None.

    Returns:
        A function with the arguments of the operator. `torch.func.vmap` of it runs sample after sample; forward mode
        (`torch.func.jvp`) raises torch's error for functions that have none.
    """
    forward_operator = getattr(torch.ops.asga, name).default
    backward_operator = getattr(torch.ops.asga, f"{name}_backward").default

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments):
            return backward_operator(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        backward = staticmethod(no_second_derivative)

    class Forward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments):
            return forward_operator(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[:tensors])
            ctx.settings = inputs[tensors:]

        @staticmethod
        def backward(ctx, grad):
            saved = ctx.saved_tensors
            grads = Backward.apply(grad, *saved, *ctx.settings)
            given = (None if tensor is None else grad for tensor, grad in zip(saved, grads, strict=True))
            return *given, *(None for _ in ctx.settings)

    return Forward.apply
