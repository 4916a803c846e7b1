"""Fused operators: the quantizers `fake_quant` and `mixed_fake_quant`; `torch.ops.asga.sam_*` for `asga.optim.ASGA`."""

from asga.ops.backends import backend, get_backend, set_backend
from asga.ops.functional import fake_quant, mixed_fake_quant

__all__ = ["backend", "fake_quant", "get_backend", "mixed_fake_quant", "set_backend"]
