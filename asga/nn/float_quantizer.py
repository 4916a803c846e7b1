"""The quantizer of weights in small floats: fp8 with a scale per output channel, fp4 with a scale per block."""

import torch
from torch import Tensor
from torch.nn import functional

from asga.nn.quantizer import Quantizer
from asga.nn.scales import least_error_scale, lsq_scale
from asga.ops.floats import FLOAT_GRIDS, float_fake_quant, float_grid, nearest_float
from asga.policy import FP4_BLOCK


class FloatWeightQuantizer(Quantizer):
    """Quantizes a weight to a small float with learned scales.

    ``"fp8"`` is E4M3 with a float32 scale per output channel. ``"fp4"`` is NVFP4: E2M1 in blocks of 16 values, each
    block with a scale in E4M3, times one float32 scale of the tensor, which puts the largest block scale at 448. What
    is learned are float32 scales; those of blocks are rounded to E4M3 on the way, straight through. A block holds 16
    consecutive values of ``weight.flatten(1)[channel]``, the last one what is left.

    Args:
        weight: The weight that sets the initial scales, ``[C, ...]``, floating point. It is not kept.
        bits: ``"fp4"`` or ``"fp8"``.
        init: Initial scales: "mse" (least squared error) or "lsq" (``2 * mean|w| / sqrt(largest value)``).

    Attributes:
        scale: Parameter, float32, ``[C]`` for fp8 and ``[C, blocks of a channel]`` for fp4.

    Raises:
        ValueError: `bits` or `init` is not supported.

    Source:
        NVIDIA, "Introducing NVFP4 for Efficient and Accurate Low-Precision Inference", 2025,
        https://developer.nvidia.com/blog/introducing-nvfp4-for-efficient-and-accurate-low-precision-inference/,
        for blocks and their two scales; that these are learned is this package's.
    """

    _scale_name = "scale"

    def __init__(self, weight: Tensor, bits: str, *, init: str = "mse") -> None:
        if bits not in FLOAT_GRIDS:
            raise ValueError(f"bits is {bits!r}; it must be one of {', '.join(map(repr, FLOAT_GRIDS))}")
        channels, values = weight.shape[0], weight[0].numel()
        scales = (channels,) if bits == "fp8" else (channels, -(-values // FP4_BLOCK))
        super().__init__((bits,), scales, init, weight.device)
        largest = FLOAT_GRIDS[bits].largest
        self.quant_mins, self.quant_maxs = [-largest], [largest]
        self._fill_grad_factor()
        self.initialize(weight)

    @property
    def bits(self) -> str:
        """The format's name."""
        return self._candidates[0]

    def initialize(self, weight: Tensor) -> None:
        """Set scales and floors anew from a weight, for example after a float checkpoint was loaded."""
        groups = weight.detach().to(torch.float32).flatten(1)
        per_group = groups.shape[1]
        if self.bits == "fp4":
            groups, per_group = _blocks(groups), _blocks(torch.ones_like(groups)).sum(1)
        if self.init == "lsq":
            mean_abs = groups.abs().sum(1) / per_group
            self._set_scales(lambda low, high: lsq_scale(mean_abs, high))
        else:
            self._set_scales(lambda low, high: least_error_scale(groups, high, self._rows, axis=0))

    def extra_repr(self) -> str:
        """The format."""
        return f"bits={self.bits!r}"

    def _candidate_shape(self) -> tuple[int, ...]:
        return ()

    def _fill_grad_factor(self) -> None:
        # LSQ's factor, 1 / sqrt(n * quant_max), expects rounding errors of the size of one step. Those of a float grow
        # with the value, up to a share of the largest one, and so does the gradient of the scale: another sqrt.
        self.grad_factor.fill_(1 / self.quant_maxs[0])

    def _rows(self, rows: Tensor, scale: Tensor) -> Tensor:
        return float_fake_quant(rows, scale[:, None], self.bits)

    def _quantize(self, weight: Tensor) -> Tensor:
        values = weight[0].numel()
        if self.bits == "fp8":
            scale = self._effective_scale(values).reshape(-1, *(1 for _ in weight.shape[1:]))
        else:
            scale = self._effective_scale(min(values, FP4_BLOCK))
            # A model in half precision has its scales in that, too.
            scale = _BlockScales.apply(scale.to(torch.promote_types(scale.dtype, torch.float32)))
            scale = scale[:, :, None].expand(-1, -1, FP4_BLOCK).flatten(1)[:, :values].reshape(weight.shape)
        return float_fake_quant(weight, scale, self.bits)


class _BlockScales(torch.autograd.Function):
    """Scales as they are stored, E4M3 times the scale of the tensor; the gradient goes straight through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scale: Tensor) -> Tensor:
        grid = float_grid("fp8")
        tensor_scale = scale.amax() / grid.largest
        return nearest_float(scale / tensor_scale, "fp8").clamp(min=grid.smallest) * tensor_scale

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def _blocks(rows: Tensor) -> Tensor:
    """``[C * blocks, 16]``: rows cut into blocks, the last one of each filled up with zeros."""
    return functional.pad(rows, (0, -rows.shape[1] % FP4_BLOCK)).reshape(-1, FP4_BLOCK)
