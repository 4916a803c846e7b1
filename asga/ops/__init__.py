"""Operators: fused `fake_quant` and `mixed_fake_quant`, `float_fake_quant`, and `torch.ops.asga.sam_*` of the step."""

from asga.ops.backends import backend, get_backend, set_backend
from asga.ops.floats import float_fake_quant
from asga.ops.functional import fake_quant, mixed_fake_quant

__all__ = ["backend", "fake_quant", "float_fake_quant", "get_backend", "mixed_fake_quant", "set_backend"]
