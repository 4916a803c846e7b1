"""Which modules of a model can be quantized, and why others cannot."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from asga.nn.layers import QuantizedLayer

_WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NORMS = (nn.LayerNorm, nn.RMSNorm)  # their weights may have two dimensions, yet they scale, not mix


def find_quantizable(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Find the layers whose weight and input can be quantized.

    These are `nn.Conv2d` and `nn.Linear`, subclasses that keep their forward, and this package's quantized
    layers. Biases, norms and other per-channel parameters stay float and are not mentioned.

    Args:
        model: Any module, which may itself be such a layer (its name is then the empty string).

    Returns:
        ``(layers, skipped)``: layer by name, and for every other module that holds a weight, why it stays
        float. Both in registration order; a module registered under several names has the first one.
    """
    bypassed = _called_around_forward(model)
    layers, skipped = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            reason = bypassed.get(module) or _reason_to_skip(module)
        elif _holds_weight(module):
            reason = f"{type(module).__name__}: only Conv2d and Linear are quantized"
        else:
            continue
        if reason is None:
            layers[name] = module
        else:
            skipped[name] = reason
    return layers, skipped


def second_names(model: nn.Module) -> dict[str, str]:
    """The further names of modules that are registered more than once, and for each the first, by which all know it."""
    first: dict[nn.Module, str] = {}
    return {
        name: first[module]
        for name, module in model.named_modules(remove_duplicate=False)
        if first.setdefault(module, name) != name
    }


def tied_layers(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Which layers have one weight parameter: for each of two or more that do, the first of them."""
    first: dict[nn.Parameter, str] = {}
    owners = {name: first.setdefault(layer.weight, name) for name, layer in layers.items()}
    shared = {owner for name, owner in owners.items() if name != owner}
    return {name: owner for name, owner in owners.items() if owner in shared}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, which rename its layers.

    Raises:
        ValueError: A module inside the model is wrapped. Its layers would be called otherwise in a policy than in the
            same model without the wrapper, for which the policy would then not fit.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    for name, module in model.named_modules():
        if _inside(module) is not None:
            raise ValueError(
                f"the module {name!r} is wrapped by {type(module).__name__}, which renames its layers: convert the "
                f"model first, and wrap what comes out of it"
            )
    return model


def _inside(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module.module
    # Of torch.compile. Its class is in torch._dynamo, whose import takes a second.
    return module._modules.get("_orig_mod")


def _called_around_forward(model: nn.Module) -> dict[nn.Module, str]:
    """Linear layers whose owner hands their weights to a fused kernel instead of calling them."""
    found = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            found[module.out_proj] = "MultiheadAttention reads this weight without calling the layer"
        elif isinstance(module, nn.TransformerEncoderLayer):
            reason = "TransformerEncoderLayer reads this weight without calling the layer in eval mode"
            found[module.linear1] = found[module.linear2] = reason
    return found


def _reason_to_skip(module: nn.Conv2d | nn.Linear) -> str | None:
    kind = type(module).__name__
    if isinstance(module, LazyModuleMixin):
        return f"{kind}: not initialized yet; run one batch through the model first"
    if is_parametrized(module):
        return f"{kind}: its parameters are parametrized; remove the parametrization first"
    weight = module._parameters.get("weight")
    if weight is None:
        return f"{kind}: its weight is not a parameter (weight norm, spectral norm, pruning)"
    base = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    if not isinstance(module, QuantizedLayer) and not _keeps_forward(module, base):
        return f"{kind}: its forward is not that of {base.__name__}"
    if weight.dtype not in _WEIGHT_DTYPES:
        return f"{kind}: weights of {weight.dtype} are not supported"
    if weight.numel() == 0:
        return f"{kind}: its weight is empty"
    return None


def _keeps_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    methods = ("__call__", "forward", "_conv_forward")
    same_class = all(getattr(type(module), m, None) is getattr(base, m, None) for m in methods)
    return same_class and not any(m in vars(module) for m in methods)


def _holds_weight(module: nn.Module) -> bool:
    """A matrix or kernel of its own; lazy parameters have no dimensions yet and count."""
    return not isinstance(module, _NORMS) and any(
        "weight" in name and (isinstance(p, nn.parameter.UninitializedParameter) or p.dim() >= 2)
        for name, p in module.named_parameters(recurse=False)
    )
