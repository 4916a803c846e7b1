"""Turning a float model into one with quantized layers, for a search or with a policy."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from asga.nn.layers import MixedConv2d, MixedLinear, QuantConv2d, QuantizedLayer, QuantLinear
from asga.nn.quantizable import find_quantizable, second_names, unwrapped
from asga.nn.quantizers import ActQuantizer, MixedActQuantizer
from asga.nn.shared import refuse_contradictions
from asga.policy import Policy, WeightBits, check_is_policy
from asga.targets import check_target, find_target

if TYPE_CHECKING:
    from asga.search.groups import Group
    from asga.search.space import SearchSpace, SpaceChoices

__all__ = ["LayerSummary", "check_policy", "find_quantizable", "prepare", "quantization_summary", "quantize"]


@dataclass(frozen=True)
class LayerSummary:
    """One row of `quantization_summary`.

    Attributes:
        name: The module's name.
        type: Its class.
        weight_bits: Bits or format of the weight, candidates in a mixed layer, None where it is float.
        act_bits: The same for the input.
        reason: Why the layer is float; empty for a quantized one.
    """

    name: str
    type: str
    weight_bits: WeightBits | tuple[WeightBits, ...] | None
    act_bits: int | tuple[int, ...] | None
    reason: str


def prepare(
    model: nn.Module, space: "SearchSpace | SpaceChoices", *, inplace: bool = False, init: str = "mse"
) -> nn.Module:
    """Make the layers of `model` searchable.

    Searched layers become mixtures over their candidates, pinned ones get their fixed bits, excluded ones
    stay float. Layers that share bits share a logits parameter, and so their probabilities; those that have one weight
    parameter, and the same bits for it, its quantizer. Activation scales are not set yet: see `asga.nn.calibrate`.

    Args:
        model: A float model; out of `torch.compile` and `DataParallel` it is taken first.
        space: The candidates of each layer: a space, or what `SearchSpace.choices` made of it for this model.
        inplace: Replace layers in `model` itself, keeping its `Parameter` objects, instead of in a deep copy.
        init: Initial scales: "mse" (least squared error) or "lsq".

    Returns:
        The converted model; `model` itself if `inplace`.

    Raises:
        ValueError: The model is converted already, has nothing to search or what the target of the space cannot run,
            is not the one that the choices were made for, is in parts compiled, or is itself a single layer, which
            cannot be replaced in place. Nothing has been changed.
    """
    model = unwrapped(model)
    check_float(model)
    choices = space.choices(model) if hasattr(space, "choices") else space
    layers, known = choices.layers, find_quantizable(model)[0]
    if unknown := [name for name in layers if name not in known]:
        raise ValueError(f"space was applied to another model: this one has no quantizable layer {unknown[0]!r}")
    pinned = {name: (c.weight_bits[0], c.act_bits[0]) for name, c in layers.items() if c.pinned}
    searched = {
        name: (_candidates(c.weight_bits), _candidates(c.act_bits)) for name, c in layers.items() if not c.pinned
    }
    converted = _convert(model, pinned, searched, choices.target, inplace, init)
    for group in choices.groups:
        _share_logits(converted, group)
    return converted


def quantize(
    model: nn.Module, policy: Policy, *, target: str | None = None, inplace: bool = False, init: str = "mse"
) -> nn.Module:
    """Give the layers of `model` the fixed bit-widths of a policy.

    The model may differ from the one the policy was searched on in whatever leaves the layers' names the
    same: number of classes, resolution, widths. Layers that have one weight parameter, and the same bits for it, share
    its quantizer. Activation scales are not set yet: see `asga.nn.calibrate`.

    Args:
        model: A float model; out of `torch.compile` and `DataParallel` it is taken first.
        policy: Bit-widths for each of its quantizable layers.
        target: Where the model will run, a name in `asga.targets.TARGETS`, or ``"any"``. None is the target that the
            policy was searched for (``"deployment_target"`` in its `meta`), if any.
        inplace: Replace layers in `model` itself, keeping its `Parameter` objects, instead of in a deep copy.
        init: Initial scales: "mse" (least squared error) or "lsq".

    Returns:
        The converted model; `model` itself if `inplace`.

    Raises:
        TypeError: `policy` is no `Policy`.
        ValueError: The policy does not fit the model or the target (`check_policy`), or the model is converted
            already, in parts compiled, or itself a single layer, which cannot be replaced in place. Nothing has been
            changed.
    """
    model = unwrapped(model)
    check_float(model)
    target = check_policy(model, policy, target=target)
    fixed = {
        name: (layer.weight_bits, layer.act_bits)
        for name, layer in policy.items()
        if (layer.weight_bits, layer.act_bits) != (None, None)
    }
    return _convert(model, fixed, {}, target, inplace, init)


def check_policy(model: nn.Module, policy: Policy, *, target: str | None = None) -> str:
    """Check that a policy fits a model and what the model will run on.

    Args:
        model: A float or converted model; it is only looked at.
        policy: Bit-widths for each of its quantizable layers.
        target: As for `quantize`.

    Returns:
        The name of the target.

    Raises:
        TypeError: `policy` is no `Policy`.
        ValueError: The policy is for other layers (`Policy.check_against`), or the target cannot run a layer with its
            bits; the message has all such layers, and what the target can run.
    """
    check_is_policy(policy)
    layers = find_quantizable(model)[0]
    policy.check_against(list(layers), second_names(model))
    target = policy.meta.get("deployment_target", "any") if target is None else target
    check_target(target, layers, {name: ((bits.weight_bits,), (bits.act_bits,)) for name, bits in policy.items()})
    return target


def quantization_summary(model: nn.Module) -> list[LayerSummary]:
    """What is quantized in a float or converted model, how, and why the rest is not.

    Returns:
        A row for every module that holds a weight, in registration order.
    """
    layers, skipped = find_quantizable(model)
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            rows.append(LayerSummary(name, type(module).__name__, module.weight_bits, module.act_bits, ""))
        elif name in layers or name in skipped:
            reason = skipped.get(name, "float: no bit-width was given to it")
            rows.append(LayerSummary(name, type(module).__name__, None, None, reason))
    return rows


def check_float(model: nn.Module) -> None:
    """Refuse a model that is converted already.

    Raises:
        ValueError: It is.
    """
    converted = next((name for name, m in model.named_modules() if isinstance(m, QuantizedLayer)), None)
    if converted is not None:
        raise ValueError(
            f"the model is converted already (layer {converted!r}): start from the float model, and load the "
            f"weights of the converted one into it if they are wanted"
        )


def _candidates(bits: tuple[int | None, ...]) -> tuple[int, ...] | None:
    """The search space writes a tensor that stays float as ``(None,)``."""
    return None if bits == (None,) else bits


def _share_logits(model: nn.Module, group: "Group") -> None:
    for side in group.sides:
        first, *others = (getattr(model.get_submodule(name), f"{side}_quantizer") for name in group.layers)
        for quantizer in others:
            quantizer.logits = first.logits


def _share_weight_quantizers(layers: Iterable[QuantizedLayer]) -> None:
    """Layers with one weight parameter and the same bits quantize it alike, so that it can be stored once."""
    first: dict[tuple, nn.Module] = {}
    for layer in layers:
        layer.weight_quantizer = first.setdefault((layer.weight, layer.weight_bits), layer.weight_quantizer)


def _convert(
    model: nn.Module, fixed: Mapping[str, tuple], searched: Mapping[str, tuple], target: str, inplace: bool, init: str
) -> nn.Module:
    """Build all layers first and swap them last, so that an error leaves the model as it was."""
    if inplace and ("" in fixed or "" in searched):
        raise ValueError(
            f"inplace is True, but the model is itself a {type(model).__name__}: use the return value of inplace=False"
        )
    model = model if inplace else copy.deepcopy(model)
    found = find_target(target)
    replacements = {}
    for bits, conv, linear in ((fixed, QuantConv2d, QuantLinear), (searched, MixedConv2d, MixedLinear)):
        for name, (weight_bits, act_bits) in bits.items():
            module = model.get_submodule(name)
            kind = conv if isinstance(module, nn.Conv2d) else linear
            layer = kind.from_float(module, weight_bits=weight_bits, act_bits=act_bits, init=init)
            if isinstance(layer.act_quantizer, ActQuantizer | MixedActQuantizer):
                layer.act_quantizer.always_signed = found is not None and not found.unsigned_inputs
            replacements[module] = layer
    _share_weight_quantizers(replacements.values())
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    model = replacements.get(model, model)
    model.register_load_state_dict_pre_hook(refuse_contradictions)
    return model
