"""Sensitivities from the curvature of the loss: the trace of the Hessian times the mean squared quantization error."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from asga.search.probe import (
    Batches,
    LossIncrease,
    Probe,
    Quantize,
    check_loss,
    layer_input,
    loss_increases,
    zeros,
)
from asga.search.space import SearchSpace, SpaceChoices
from asga.steps import LossFunction, batch_loss


def hessian_sensitivity(
    model: nn.Module,
    space: SearchSpace | SpaceChoices,
    batches: Batches,
    *,
    loss_fn: LossFunction = functional.cross_entropy,
    probes: int = 4,
) -> dict[str, LossIncrease]:
    """Estimate from second derivatives what every candidate costs in loss, as HAWQ-V2.

    Quantizing a tensor of n values moves it by e. If the Hessian H of the loss treats all directions alike, the loss
    rises by ``1/2 trace(H) / n * ||e||^2``: for a weight with the Hessian of the mean loss, for an input with that of
    each sample's loss, the mean of which is given. Traces are estimated with vectors v of random signs as the mean of
    ``v' H v`` (Hutchinson), for the weights of all layers at once, and for all inputs at once: derivatives across
    layers cancel on average. A negative estimate counts as zero. It measures damage before training, and knows nothing
    of what training repairs.

    Args:
        model: The float model, trained. It is copied, not changed. All its operations need second derivatives.
        space: The candidates: a space, or what `SearchSpace.choices` made of it for this model.
        batches: Pairs of inputs, of any form that `asga.evaluate` takes, and labels. They also set the scales of the
            activations.
        loss_fn: The mean loss over a batch of logits and labels.
        probes: Random vectors for each batch, from torch's global generator.

    Returns:
        By layer of the space, pinned ones included. Zero where the loss does not depend on the layer. What a weight
        that several layers have costs is with the first of them.

    Raises:
        TrainingError: The loss or a derivative of a batch is not finite.
        ValueError: `probes` is less than 1.

    Source:
        Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", NeurIPS 2020, with its
        extension to activations. Hutchinson, "A stochastic estimator of the trace of the influence matrix for
        Laplacian smoothing splines", 1990.
    """
    if probes < 1:
        raise ValueError(f"probes is {probes}; it must be at least 1")
    probe = Probe(model, space, batches)
    totals = zeros(probe.layers)
    probed_weights = {probed.layer.weight: name for name, probed in reversed(probe.layers.items()) if probed.weight}
    weights = [
        _Variable(totals[name][0], weight.requires_grad_(), _errors(weight, probe.layers[name].weight))
        for weight, name in reversed(probed_weights.items())
    ]
    for number, (inputs, labels) in enumerate(batches, 1):
        moves: list[_Variable] = []
        handles = [
            probed.layer.register_forward_pre_hook(_mover(moves, totals[name][1], probed.act), with_kwargs=True)
            for name, probed in probe.layers.items()
            if probed.act
        ]
        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                loss = batch_loss(probe.model, inputs, labels, loss_fn=loss_fn)
                check_loss(loss.item(), number)
                _add_increases(loss, (weights, moves), probes)
        finally:
            for handle in handles:
                handle.remove()
    return {
        name: LossIncrease(*(tuple(max(0.0, value) for value in values) for values in found))
        for name, found in loss_increases(totals, len(batches)).items()
    }


class _Variable(NamedTuple):
    """A tensor that the loss is differentiated by: where its estimates are added up, and its mean squared errors."""

    total: Tensor
    value: Tensor
    errors: Tensor


def _mover(moves: list[_Variable], total: Tensor, candidates: Sequence[Quantize]) -> Callable[..., tuple[tuple, dict]]:
    """A hook that adds a zero to the input of a layer, a variable at every call."""

    def hook(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = layer_input(args, kwargs)
        move = torch.zeros_like(x, requires_grad=True)
        moves.append(_Variable(total, move, _errors(x, candidates)))
        return (x + move,), {}

    return hook


def _errors(tensor: Tensor, candidates: Sequence[Quantize]) -> Tensor:
    """The mean squared error of every candidate."""
    tensor = tensor.detach()
    return torch.stack([(quantize(tensor) - tensor).square().mean(dtype=torch.float64) for quantize in candidates])


def _add_increases(loss: Tensor, kinds: Sequence[Sequence[_Variable]], probes: int) -> None:
    """Add what a batch says of the variables; derivatives across kinds, which can be larger, are not taken."""
    values = [[variable.value for variable in variables] for variables in kinds]
    known = {"allow_unused": True, "materialize_grads": True}
    gradients = iter(torch.autograd.grad(loss, [v for kind in values for v in kind], create_graph=True, **known))
    for variables, of_kind in zip(kinds, values, strict=True):
        first = list(itertools.islice(gradients, len(of_kind)))
        for _ in range(probes):
            signs = [torch.randint_like(value, 2).mul_(2).sub_(1) for value in of_kind]
            product = sum((g * sign).sum() for g, sign in zip(first, signs, strict=True))
            if not of_kind or not product.requires_grad:  # there are none, or the loss is linear in them
                break
            second = torch.autograd.grad(product, of_kind, retain_graph=True, **known)
            for variable, sign, curvature in zip(variables, signs, second, strict=True):
                trace = (sign * curvature).sum(dtype=torch.float64)
                variable.total.add_(0.5 / probes * trace * variable.errors)
