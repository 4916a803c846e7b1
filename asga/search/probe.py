"""What all sensitivities start from: a float copy of the model, and calibrated candidates for each of its layers."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from asga._batches import Inputs
from asga.convert import prepare
from asga.nn import MixedActQuantizer, MixedWeightQuantizer, QuantizedLayer, calibrate
from asga.search.space import SearchSpace, SpaceChoices
from asga.steps import TrainingError

Batches = Sequence[tuple[Inputs, Tensor]]
Quantize = Callable[[Tensor], Tensor]


class ProbedLayer(NamedTuple):
    """A float layer, and what each candidate makes of its weight and of its input; nothing where there is no choice."""

    layer: nn.Conv2d | nn.Linear
    weight: tuple[Quantize, ...]
    act: tuple[Quantize, ...]


class Probe:
    """A float copy of a model in eval mode, its parameters frozen, and the candidates of its layers.

    Args:
        model: The float model; left as it is.
        space: The candidates: a space, or what `SearchSpace.choices` made of it for this model.
        batches: Pairs of inputs and labels, which set the scales of the activations.

    Attributes:
        model: The copy.
        layers: By name, in the order of the space, pinned layers included.
    """

    def __init__(self, model: nn.Module, space: SearchSpace | SpaceChoices, batches: Batches) -> None:
        mixed = prepare(model, space).eval()
        calibrate(mixed, batches)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.layers = {
            name: ProbedLayer(
                self.model.get_submodule(name), _candidates(module.weight_quantizer), _candidates(module.act_quantizer)
            )
            for name, module in mixed.named_modules()
            if isinstance(module, QuantizedLayer)
        }


class LossIncrease(NamedTuple):
    """How much the loss rises when a single tensor of a layer is quantized, by candidate, in the order of its choices.

    A tensor without a choice, pinned or float, has one zero.
    """

    weight: tuple[float, ...]
    act: tuple[float, ...]


def check_loss(loss: float, batch: int) -> None:
    """Refuse a loss that would make every sensitivity NaN.

    Args:
        loss: Of a batch.
        batch: Its number, counted from 1.

    Raises:
        TrainingError: It is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss of the float model is {loss} on batch {batch} of those that sensitivities are measured on: "
            f"leave that batch out, or check loss_fn and its labels"
        )


def loss_increases(totals: Mapping[str, tuple[Tensor, Tensor]], count: int) -> dict[str, LossIncrease]:
    """Sums over `count` samples or batches, per layer and candidate of weight and act, as means.

    Raises:
        TrainingError: A sum is NaN or infinite.
    """
    for name, sums in totals.items():
        if not all(bool(torch.isfinite(total).all()) for total in sums):
            raise TrainingError(
                f"the sensitivity of layer {name!r} is not finite, while the loss is on every batch: its gradient is "
                f"not, or it overflows"
            )
    return {
        name: LossIncrease(*(tuple((total / count).tolist()) or (0.0,) for total in pair))
        for name, pair in totals.items()
    }


def zeros(layers: Mapping[str, ProbedLayer]) -> dict[str, tuple[Tensor, Tensor]]:
    """A zero per layer and candidate of weight and act, float64, on the layer's device."""
    return {
        name: tuple(
            torch.zeros(len(candidates), dtype=torch.float64, device=probed.layer.weight.device)
            for candidates in (probed.weight, probed.act)
        )
        for name, probed in layers.items()
    }


def layer_input(args: tuple, kwargs: dict) -> Tensor:
    """The input of a `Conv2d` or `Linear`, from the arguments that a hook is given."""
    return args[0] if args else kwargs["input"]


def apply_linear(layer: nn.Conv2d | nn.Linear, input: Tensor, weight: Tensor) -> Tensor:
    """What the layer makes of another input or weight, without its bias: linear in each of them."""
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(input, weight, None)
    return functional.linear(input, weight)


def _candidates(quantizer: nn.Module) -> tuple[Quantize, ...]:
    if not isinstance(quantizer, MixedWeightQuantizer | MixedActQuantizer):
        return ()
    return tuple(partial(_quantized, quantizer, index) for index in range(len(quantizer.bits)))


@torch.no_grad()
def _quantized(quantizer: MixedWeightQuantizer | MixedActQuantizer, index: int, input: Tensor) -> Tensor:
    return quantizer.candidate(input, index)
