"""Sensitivities: how much the loss would rise if one tensor of one layer were quantized, without any training."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from asga.search.probe import (
    Batches,
    LossIncrease,
    Probe,
    ProbedLayer,
    Quantize,
    apply_linear,
    check_loss,
    layer_input,
    loss_increases,
    zeros,
)
from asga.search.space import SearchSpace, SpaceChoices
from asga.steps import LossFunction, batch_loss, evaluate


def gradient_sensitivity(
    model: nn.Module,
    space: SearchSpace | SpaceChoices,
    batches: Batches,
    *,
    loss_fn: LossFunction = functional.cross_entropy,
    autocast: torch.dtype | None = None,
) -> dict[str, LossIncrease]:
    """Estimate from gradients what every candidate costs in loss: one forward and one backward pass a batch.

    Quantizing a tensor moves the output of its layer by e. To second order, with the Fisher information in place of
    the Hessian and only its diagonal, the loss of a sample then rises by ``1/2 sum_i (g_i e_i)^2``, where g is the
    gradient of that sample's loss with respect to the output. Given is the mean over all samples. It measures damage
    before training, and knows nothing of what training repairs.

    Args:
        model: The float model, trained. It is copied, not changed.
        space: The candidates: a space, or what `SearchSpace.choices` made of it for this model.
        batches: Pairs of inputs, of any form that `asga.evaluate` takes, and labels. They also set the scales of the
            activations.
        loss_fn: The mean loss over a batch of logits and labels.
        autocast: Run the model under autocast to this dtype.

    Returns:
        By layer of the space, pinned ones included. Zero where the loss does not depend on the layer.

    Raises:
        TrainingError: The loss or a gradient of a batch is not finite.

    Source:
        NVIDIA's Model Optimizer, `modelopt.torch.quantization.algorithms.AutoQuantizeGradientSearcher`, whose score is
        ``sum (g e)^2``; here of weight and input apart, and with the factors that make it a loss.
    """
    probe = Probe(model, space, batches)
    totals, samples = zeros(probe.layers), 0

    def score(name: str, input: Tensor, size: int) -> Callable[[Tensor], None]:
        probed, (of_weight, of_act) = probe.layers[name], totals[name]
        layer, weight, x = probed.layer, probed.layer.weight.float(), input.detach().float()

        @torch.no_grad()
        def add(gradient: Tensor) -> None:
            g = gradient.float()
            for k, quantize in enumerate(probed.weight):
                of_weight[k] += _fisher(g, apply_linear(layer, x, quantize(weight) - weight), size)
            for k, quantize in enumerate(probed.act):
                of_act[k] += _fisher(g, apply_linear(layer, quantize(x) - x, weight), size)

        return add

    def watch(name: str, size: int) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            # No parameter has a gradient, so the graph begins at the first layer: not with a leaf, which could not
            # be written to by the operation that follows.
            output = output if output.requires_grad else output.requires_grad_().clone()
            output.register_hook(score(name, layer_input(args, kwargs), size))
            return output

        return hook

    for number, (inputs, labels) in enumerate(batches, 1):
        handles = [
            probed.layer.register_forward_hook(watch(name, len(labels)), with_kwargs=True)
            for name, probed in probe.layers.items()
            if probed.weight or probed.act
        ]
        try:
            loss = batch_loss(probe.model, inputs, labels, loss_fn=loss_fn, autocast=autocast)
            check_loss(loss.item(), number)
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()
        samples += len(labels)
    return loss_increases(totals, samples)


def measured_sensitivity(
    model: nn.Module,
    space: SearchSpace | SpaceChoices,
    batches: Batches,
    *,
    loss_fn: LossFunction = functional.cross_entropy,
    autocast: torch.dtype | None = None,
) -> dict[str, LossIncrease]:
    """Measure what every candidate costs in loss: a forward pass for every layer, tensor, candidate and batch.

    What the others estimate, at some fifty times the price: the loss with a single tensor quantized minus that of the
    float model. Negative where quantizing happens to help.

    Args:
        model: The float model, trained. It is copied, not changed.
        space: The candidates: a space, or what `SearchSpace.choices` made of it for this model.
        batches: Pairs of inputs, of any form that `asga.evaluate` takes, and labels. They also set the scales of the
            activations.
        loss_fn: The mean loss over a batch of logits and labels.
        autocast: Run the model under autocast to this dtype.

    Returns:
        By layer of the space, pinned ones included.

    Raises:
        TrainingError: The loss of a batch is not finite.
    """
    probe = Probe(model, space, batches)

    def loss() -> float:
        return evaluate(probe.model, batches, loss_fn=loss_fn, autocast=autocast).loss

    def with_weight(layer: nn.Module, quantize: Quantize) -> float:
        weight = layer.weight
        # Another parameter: a layer that shares this one keeps it.
        layer.weight = nn.Parameter(quantize(weight), requires_grad=False)
        try:
            return loss()
        finally:
            layer.weight = weight

    def with_act(layer: nn.Module, quantize: Quantize) -> float:
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return (quantize(layer_input(args, kwargs)),), {}

        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            return loss()
        finally:
            handle.remove()

    def increases(probed: ProbedLayer) -> LossIncrease:
        of_weight = tuple(with_weight(probed.layer, quantize) - base for quantize in probed.weight)
        of_act = tuple(with_act(probed.layer, quantize) - base for quantize in probed.act)
        return LossIncrease(of_weight or (0.0,), of_act or (0.0,))

    base = loss()
    if not math.isfinite(base):
        for number, batch in enumerate(batches, 1):
            check_loss(evaluate(probe.model, [batch], loss_fn=loss_fn, autocast=autocast).loss, number)
    return {name: increases(probed) for name, probed in probe.layers.items()}


def _fisher(gradient: Tensor, error: Tensor, size: int) -> Tensor:
    """``1/2 sum_i (g_i e_i)^2`` over all samples; the gradient is that of their mean loss, so g is `size` times it."""
    return 0.5 * (size * gradient * error).square().sum(dtype=torch.float64)
