"""Sorting a converted model's parameters for optimizers."""

from torch import nn

from asga.nn.quantizer import Quantizer
from asga.nn.quantizers import MixedActQuantizer, MixedWeightQuantizer


def parameter_groups(model: nn.Module, *, weight_decay: float, lr: float | None = None) -> list[dict[str, object]]:
    """Parameter groups for `asga.optim.ASGA` or any other optimizer, without the logits.

    Weights are decayed; norms, biases and other parameters of at most one dimension are not. Scales are
    neither decayed, which would drive them to zero, nor perturbed: each moves all values that share it.

    Args:
        model: A converted or a float model.
        weight_decay: For weights (parameters of two or more dimensions).
        lr: Learning rate of all groups; None leaves it to the optimizer.

    Returns:
        Up to three groups with the keys "params", "weight_decay", "rho_scale" (the share of the radius that
        `ASGA` perturbs them by, 1 or 0), and "lr" if given. Each trainable parameter is in one of them, once;
        logits and frozen parameters are in none; empty groups are left out.
    """
    scales = {id(m.scale_parameter): m.scale_parameter for m in model.modules() if isinstance(m, Quantizer)}
    apart = scales.keys() | {id(parameter) for parameter in logits(model)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    sorted_parameters = (
        ([p for p in rest if p.dim() >= 2], weight_decay, 1.0),
        ([p for p in rest if p.dim() < 2], 0.0, 1.0),
        ([p for p in scales.values() if p.requires_grad], 0.0, 0.0),
    )
    shared = {} if lr is None else {"lr": lr}
    return [
        {"params": parameters, "weight_decay": decay, "rho_scale": rho_scale, **shared}
        for parameters, decay, rho_scale in sorted_parameters
        if parameters
    ]


def logits(model: nn.Module) -> list[nn.Parameter]:
    """The logits of a model's mixtures, in registration order; each layer has those of its weight first.

    Mixtures that share their logits give them once.
    """
    mixtures = (m for m in model.modules() if isinstance(m, MixedWeightQuantizer | MixedActQuantizer))
    return list(dict.fromkeys(mixture.logits for mixture in mixtures))
