"""What an operator must refuse when somebody calls `torch.ops.asga` directly, lest a kernel read past a tensor.

In the words of the C++ and CUDA kernels, which check the same. `asga.ops.functional` checks more, and before.
"""

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin

MAX_CANDIDATES = 8  # kMaxCandidates in csrc/quant_math.h
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_quantizer(input: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None) -> None:
    """The tensors and the axis of `fake_quant`.

    Raises:
        RuntimeError: Something does not fit; the message names it.
    """
    channels = _channels(input, axis)
    _check_parameter("scale", scale, channels, input)
    if zero_point is not None:
        _check_parameter("zero_point", zero_point, channels, input)


def check_mixture(
    input: Tensor,
    scales: Tensor,
    probs: Tensor,
    zero_points: Tensor | None,
    quant_mins: list[int],
    quant_maxs: list[int],
    axis: int | None,
) -> None:
    """The arguments of `mixed_fake_quant`; see `check_quantizer`."""
    candidates = len(quant_mins)
    if not 1 <= candidates <= MAX_CANDIDATES:
        raise RuntimeError(f"quant_mins has {candidates} candidates; between 1 and {MAX_CANDIDATES} are supported")
    if len(quant_maxs) != candidates:
        raise RuntimeError(f"quant_maxs has {len(quant_maxs)} entries but quant_mins has {candidates}")
    numel = candidates * _channels(input, axis)
    _check_parameter("scales", scales, numel, input)
    _check_parameter("probs", probs, candidates, input)
    if zero_points is not None:
        _check_parameter("zero_points", zero_points, numel, input)


def check_grad(grad: Tensor, input: Tensor) -> None:
    """The gradient of an output; see `check_quantizer`."""
    _check_device("grad", grad, input)
    _check_dense("grad", grad)
    if grad.shape != input.shape:
        raise RuntimeError("grad does not have the shape of input")


def check_tensors(input: Tensor, **others: Tensor | None) -> None:
    """What no public operator takes. Fused ones ask once a call has failed: whatever it said, this is why.

    Raises:
        TypeError: An argument is no tensor, or one whose values have no strides.
    """
    for name, tensor in {"input": input, **others}.items():
        if tensor is None and name.startswith("zero_point"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {tensor!r}, of type {type(tensor).__name__}; a tensor is needed") from None
        if isinstance(tensor, UninitializedTensorMixin):
            raise TypeError(f"{name} is an uninitialized parameter; run one batch through its module first") from None
        if tensor.layout is not torch.strided or tensor.is_nested:
            layout = "is a nested tensor" if tensor.is_nested else f"has layout {tensor.layout}"
            raise TypeError(f"{name} {layout}; a dense tensor is needed") from None


def _channels(input: Tensor, axis: int | None) -> int:
    """How many scales the input has, per candidate."""
    if input.dtype not in INPUT_DTYPES:
        raise RuntimeError(f"input has dtype {input.dtype}; float32, bfloat16, float16 and float64 are supported")
    _check_dense("input", input)
    if axis is None:
        return 1
    if not 0 <= axis < input.dim():
        raise RuntimeError(f"axis is {axis}, but input has {input.dim()} dimensions")
    return input.shape[axis]


def _check_parameter(name: str, tensor: Tensor, numel: int, input: Tensor) -> None:
    _check_device(name, tensor, input)
    _check_dense(name, tensor)
    if tensor.numel() != numel:
        raise RuntimeError(f"{name} has {tensor.numel()} elements, but {numel} are needed")


def _check_dense(name: str, tensor: Tensor) -> None:
    """The compiled kernels are not called with other layouts, so that this is in plain torch alone."""
    if tensor.layout is not torch.strided:
        raise RuntimeError(f"{name} has layout {tensor.layout}; a dense tensor is needed (tensor.to_dense())")


def _check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise RuntimeError(f"{name} is on {tensor.device} but input is on {input.device}")
