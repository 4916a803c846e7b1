"""Options that a trainer hands on to its optimizer, checked when they are given to the trainer."""

from collections.abc import Mapping
from inspect import signature

import torch
from torch import nn

from asga._checks import plain
from asga.optim._quantized import quantized_layers
from asga.optim.asga import ASGA
from asga.optim.guarded import GuardedSGD
from asga.policy import did_you_mean


def check_optimizer_options(
    method: str, options: Mapping[str, object], *, two_passes: bool, momentum: float, lr: float
) -> dict[str, object]:
    """Refuse what the optimizer of a method would refuse, before a trainer changes anything.

    Args:
        method: What the trainer calls it, for messages.
        options: For `ASGA` around SGD, or for SGD alone.
        two_passes: Whether it is `ASGA`.
        momentum: An argument of the trainer, like `lr`.
        lr: Likewise.

    Returns:
        The options; numbers of NumPy's as Python's.

    Raises:
        TypeError: `options` is no mapping, or a value is of another type.
        ValueError: There is an option that the optimizer does not know, or a value is out of range.
    """
    if not isinstance(options, Mapping):
        raise TypeError(f"optimizer_options is {options!r}; a mapping such as {{'rho_max': 0.2}} is needed")
    own = {"lr", "momentum", "weight_decay"}
    known = {*signature(torch.optim.SGD).parameters, *(signature(ASGA).parameters if two_passes else ())}
    known -= {*own, "params", "base_optimizer", "base_kwargs", "model", "nesterov"}
    for name in options:
        if name in own:
            raise ValueError(f"optimizer_options has {name!r}, an argument of its own: {name}={options[name]!r}")
        if name not in known:
            hint = did_you_mean(name, known) or f"; those are {', '.join(sorted(known))}"
            raise ValueError(f"optimizer_options has {name!r}, which is no option of method {method!r}{hint}")
    options = {name: plain(value) for name, value in options.items()}
    # Its own checks see the values. What it needs the model for has to wait for that.
    values = {name: value for name, value in options.items() if (name, value) != ("perturb", "quantized")}
    if len(values) < len(options) and values.get("adaptive"):
        raise ValueError("optimizer_options has perturb 'quantized' and adaptive; give one of them")
    sgd = {"lr": lr, "momentum": momentum, "nesterov": momentum > 0}
    stand_in = nn.utils.skip_init(nn.Linear, 1, 1)  # draws no random numbers
    if two_passes:
        ASGA(stand_in.parameters(), torch.optim.SGD, **sgd, **values)
    else:
        GuardedSGD(stand_in.parameters(), model=stand_in, **sgd, **values)
    return options


def check_suits_model(options: Mapping[str, object], model: nn.Module) -> None:
    """Refuse options that need of a model what it has not.

    Args:
        options: From `check_optimizer_options`.
        model: That will be trained.

    Raises:
        ValueError: Quantized weights are to be perturbed, and there are none.
    """
    if options.get("perturb") == "quantized" and not any(quantized_layers(model)):
        raise ValueError("optimizer_options has perturb 'quantized', but the model has no quantized weight")
