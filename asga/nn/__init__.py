"""Quantizers and quantized layers, their calibration, and what an optimizer needs to know about them."""

from asga.nn.calibration import calibrate
from asga.nn.float_quantizer import FloatWeightQuantizer
from asga.nn.layers import MixedConv2d, MixedLinear, QuantConv2d, QuantizedLayer, QuantLinear
from asga.nn.parameters import logits, parameter_groups
from asga.nn.quantizable import find_quantizable
from asga.nn.quantizer import Quantizer
from asga.nn.quantizers import (
    ActQuantizer,
    MixedActQuantizer,
    MixedWeightQuantizer,
    WeightQuantizer,
    set_temperature,
)

__all__ = [
    "ActQuantizer",
    "FloatWeightQuantizer",
    "MixedActQuantizer",
    "MixedConv2d",
    "MixedLinear",
    "MixedWeightQuantizer",
    "QuantConv2d",
    "QuantLinear",
    "QuantizedLayer",
    "Quantizer",
    "WeightQuantizer",
    "calibrate",
    "find_quantizable",
    "logits",
    "parameter_groups",
    "set_temperature",
]
