"""Sharpness-aware training: `ASGA` wraps any base optimizer in a two-pass step with an adaptive radius."""

from asga.optim.asga import ASGA

__all__ = ["ASGA"]
