"""Convolutions and linear layers that quantize their weight and their input."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from asga.nn.float_quantizer import FloatWeightQuantizer
from asga.nn.quantizers import ActQuantizer, MixedActQuantizer, MixedWeightQuantizer, WeightQuantizer
from asga.policy import WeightBits, check_weight_bits

Bits = WeightBits | Sequence[WeightBits] | None


class QuantizedLayer(nn.Module):
    """What all quantized layers share; the second base class is the layer to quantize.

    Attributes:
        weight_quantizer: Applied to `weight`; `nn.Identity` where the weight stays float.
        act_quantizer: Applied to the input; `nn.Identity` where the input stays float.
    """

    _quantizers: tuple[Callable[..., nn.Module], Callable[..., nn.Module]]

    def __init__(self, *args, weight_bits: Bits, act_bits: Bits, init: str = "mse", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(weight_bits, act_bits, init)

    @classmethod
    def from_float(cls, module: nn.Module, *, weight_bits: Bits, act_bits: Bits, init: str = "mse") -> "QuantizedLayer":
        """Make a quantized layer that takes the place of a float one.

        It holds the same `Parameter` objects, so tied weights stay tied and optimizers valid, and the same
        hooks, mode and state-dict names.

        Args:
            module: A layer of the type that this class derives from. It is left as it is.
            weight_bits: Bits of the weight, ``"fp4"`` or ``"fp8"`` (mixed layers: the candidates), or None to leave
                it float.
            act_bits: Bits of the input, or None.
            init: Initial scales, "mse" or "lsq".

        Returns:
            The layer; its activation quantizer is not calibrated yet.

        Raises:
            TypeError: `module` is of another type, or bits are not integers.
            ValueError: Bits or `init` are not supported.
        """
        base = nn.Conv2d if issubclass(cls, nn.Conv2d) else nn.Linear
        if not isinstance(module, base) or isinstance(module, QuantizedLayer):
            raise TypeError(f"module is a {type(module).__name__}; a float {base.__name__} is needed")
        layer = cls.__new__(cls)
        layer.__dict__.update(module.__dict__)
        # Tables that the two layers must not share. Hooks they do, so that handles given out can remove them.
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            layer.__dict__[table] = module.__dict__[table].copy()
        layer._add_quantizers(weight_bits, act_bits, init)
        return layer

    @property
    def weight_bits(self) -> WeightBits | tuple[WeightBits, ...] | None:
        """Bits or format of the weight, candidates in a mixed layer, None where it stays float."""
        return getattr(self.weight_quantizer, "bits", None)

    @property
    def act_bits(self) -> int | tuple[int, ...] | None:
        """Bit-width of the input, candidates in a mixed layer, None where it stays float."""
        return getattr(self.act_quantizer, "bits", None)

    def extra_repr(self) -> str:
        """The layer's own, and the bits."""
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, act_bits={self.act_bits}"

    def _add_quantizers(self, weight_bits: Bits, act_bits: Bits, init: str) -> None:
        weight_quantizer, act_quantizer = self._quantizers
        weight = self.weight
        self.weight_quantizer = (
            nn.Identity() if weight_bits is None else weight_quantizer(weight, weight_bits, init=init)
        )
        self.act_quantizer = (
            nn.Identity() if act_bits is None else act_quantizer(act_bits, init=init, device=weight.device)
        )
        self.weight_quantizer.train(self.training)
        self.act_quantizer.train(self.training)


class _Conv2d(QuantizedLayer, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.act_quantizer(input), self.weight_quantizer(self.weight), self.bias)


class _Linear(QuantizedLayer, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.act_quantizer(input), self.weight_quantizer(self.weight), self.bias)


def _fixed_weight_quantizer(weight: Tensor, bits: WeightBits, *, init: str) -> nn.Module:
    bits = check_weight_bits("bits", bits)
    return (FloatWeightQuantizer if isinstance(bits, str) else WeightQuantizer)(weight, bits, init=init)


class QuantConv2d(_Conv2d):
    """`nn.Conv2d` with a fixed bit-width for its weight and one for its input.

    Args:
        *args: Those of `nn.Conv2d`.
        weight_bits: 2 to 8, ``"fp4"``, ``"fp8"``, or None to leave the weight float.
        act_bits: 2 to 8, or None to leave the input float.
        init: Initial scales, "mse" or "lsq".
        **kwargs: Those of `nn.Conv2d`.
    """

    _quantizers = (_fixed_weight_quantizer, ActQuantizer)


class QuantLinear(_Linear):
    """`nn.Linear` with a fixed bit-width for its weight and one for its input.

    Args:
        *args: Those of `nn.Linear`.
        weight_bits: 2 to 8, ``"fp4"``, ``"fp8"``, or None to leave the weight float.
        act_bits: 2 to 8, or None to leave the input float.
        init: Initial scales, "mse" or "lsq".
        **kwargs: Those of `nn.Linear`.
    """

    _quantizers = (_fixed_weight_quantizer, ActQuantizer)


class MixedConv2d(_Conv2d):
    """`nn.Conv2d` whose weight and input are mixtures over candidate bit-widths; one convolution in all.

    Args:
        *args: Those of `nn.Conv2d`.
        weight_bits: Different formats, each 2 to 8, ``"fp4"`` or ``"fp8"``, or None to leave the weight float.
        act_bits: Different bit-widths, each 2 to 8, or None to leave the input float.
        init: Initial scales, "mse" or "lsq".
        **kwargs: Those of `nn.Conv2d`.
    """

    _quantizers = (MixedWeightQuantizer, MixedActQuantizer)


class MixedLinear(_Linear):
    """`nn.Linear` whose weight and input are mixtures over candidate bit-widths; one product in all.

    Args:
        *args: Those of `nn.Linear`.
        weight_bits: Different formats, each 2 to 8, ``"fp4"`` or ``"fp8"``, or None to leave the weight float.
        act_bits: Different bit-widths, each 2 to 8, or None to leave the input float.
        init: Initial scales, "mse" or "lsq".
        **kwargs: Those of `nn.Linear`.
    """

    _quantizers = (MixedWeightQuantizer, MixedActQuantizer)
