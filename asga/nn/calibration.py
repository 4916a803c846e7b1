"""Setting activation scales from a few batches, before any training."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from asga._batches import Batch, call, inputs_of, to_device
from asga._modes import modes_kept
from asga.nn.observer import ActStatistics
from asga.nn.quantizer import Quantizer
from asga.nn.quantizers import ActQuantizer, MixedActQuantizer


def calibrate(model: nn.Module, batches: Iterable[Tensor | Batch], *, again: bool = True) -> None:
    """Set sign and scale of every activation quantizer from the activations of the float network.

    Runs the batches in eval mode without gradient while all quantizers, those of weights too, let their
    input pass. If anything fails, the model is as before. With several processes, call it before the model
    is wrapped and with the same batches in each, or the scales will differ.

    Args:
        model: A converted model.
        batches: A few batches, all of which are run: a tensor, a tuple or list whose first entry is the inputs
            (labels may follow), or a mapping of keyword arguments, whose entry "labels" is left out. Inputs are a
            tensor, a tuple of positional or a mapping of keyword arguments; tensors are moved to the model's device.
        again: Also set what is set already, such as scales that were trained. If there is nothing to set, no batch is
            run.

    Raises:
        ValueError: There is no batch, or the activations are not finite.
        TypeError: A batch is of none of these types.

    Warns:
        UserWarning: The batches did not reach some quantizers, which stay as they were.
    """
    quantizers = {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}
    statistics = {
        name: ActStatistics(keep_sample=quantizer.init == "mse")
        for name, quantizer in quantizers.items()
        if isinstance(quantizer, ActQuantizer | MixedActQuantizer) and (again or not quantizer.calibrated)
    }
    if not statistics:
        return
    try:
        for name, quantizer in quantizers.items():
            quantizer._observe = statistics[name].update if name in statistics else _ignore
        with modes_kept(model):
            model.eval()
            _run(model, batches)
    finally:
        for quantizer in quantizers.values():
            quantizer._observe = None
    seen = {name: found for name, found in statistics.items() if not found.empty}
    for name, found in seen.items():
        try:
            found.signed()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, found in seen.items():
        quantizers[name].initialize(found)
    if len(seen) < len(statistics):
        missed = ", ".join(repr(name) for name in statistics if name not in seen)
        warnings.warn(f"no calibration batch reached {missed}", stacklevel=2)


def _run(model: nn.Module, batches: Iterable[Tensor | Batch]) -> None:
    device = next(model.parameters()).device  # at least a scale is there
    count = 0
    # A compiled model must run eagerly here: observers are not part of its graph.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for batch in batches:
            call(model, to_device(inputs_of(batch), device))
            count += 1
    if count == 0:
        raise ValueError("batches is empty: calibration needs at least one batch")


def _ignore(input: Tensor) -> None:
    """The observer of weights: their scales are known already."""
