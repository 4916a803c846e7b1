"""What a policy costs: BitOps of one sample and size of the weights, in exact integers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from asga.policy import FLOAT_BITS, FP4_BLOCK, Policy, WeightBits, bit_width, did_you_mean
from asga.search.space import LayerChoices, SpaceChoices

ExampleInputs = Tensor | tuple | list | dict


@dataclass(frozen=True)
class LayerProfile:
    """What the costs need to know about one layer.

    Args:
        name: Of the module in the model.
        kind: ``"Conv2d"`` or ``"Linear"``.
        macs: Multiply-accumulates of one sample.
        weight_numel: Elements of the weight.
        out_channels: Output channels or features: the number of weight scales.
    """

    name: str
    kind: str
    macs: int
    weight_numel: int
    out_channels: int


@dataclass(frozen=True)
class Costs:
    """What a policy costs, by metric.

    Args:
        bitops: Bit operations of one sample, the sum of MACs x weight bits x input bits.
        size_bits: Bits to store the weights of the quantizable layers and all scales.
    """

    bitops: int
    size_bits: int

    @property
    def size_bytes(self) -> int:
        """`size_bits` in whole bytes, rounded up."""
        return -(-self.size_bits // 8)


def layer_bitops(layer: LayerProfile, weight_bits: WeightBits | None, act_bits: int | None) -> int:
    """Bit operations of one sample: MACs x weight bits x input bits, None being 32 bits.

    A small float counts the bits of one of its values, fp8 eight and fp4 four, though its multiplier is not that of an
    integer. Biases, norms and activation functions are not counted.

    Source:
        Cai and Vasconcelos, "Rethinking Differentiable Search for Mixed-Precision Neural Networks" (EdMIPS),
        CVPR 2020.
    """
    return layer.macs * bit_width(weight_bits) * bit_width(act_bits)


def layer_size_bits(layer: LayerProfile, weight_bits: WeightBits | None, act_bits: int | None) -> int:
    """Bits to store a layer's weight and scales.

    A quantized weight has `weight_bits` per element and a 32-bit scale per output channel, a quantized input
    one 32-bit scale; a float weight has 32 bits per element. fp4 has an 8-bit scale per block of 16 values, and one
    32-bit scale in all. Biases, norms and other float parameters are the same for every policy and not counted.
    """
    act_scale = 0 if act_bits is None else FLOAT_BITS
    return layer.weight_numel * bit_width(weight_bits) + _weight_scale_bits(layer, weight_bits) + act_scale


def _weight_scale_bits(layer: LayerProfile, weight_bits: WeightBits | None) -> int:
    if weight_bits is None:
        return 0
    if weight_bits == "fp4":
        blocks = -(-layer.weight_numel // (layer.out_channels * FP4_BLOCK))
        return layer.out_channels * blocks * bit_width("fp8") + FLOAT_BITS
    return layer.out_channels * FLOAT_BITS


CostFunction = Callable[[LayerProfile, WeightBits | None, int | None], int]
METRICS: dict[str, CostFunction] = {"bitops": layer_bitops, "size_bits": layer_size_bits}


def profile_layers(model: nn.Module, example_inputs: ExampleInputs, names: Iterable[str]) -> dict[str, LayerProfile]:
    """Measure layers by running the model once, in eval mode and without gradients.

    MACs come from the shapes met on the way, so strides, dilation, groups and inputs of any rank are counted
    rightly, and a layer called twice counts twice. Training mode, buffers, hooks and the random state of CPU
    and CUDA are afterwards what they were, also when the model raises.

    Args:
        model: Its `Conv2d` and `Linear` layers may be plain or those of `asga.nn`, calibrated.
        example_inputs: A tensor, positional arguments, or a dict of keyword arguments, on the model's device.
            Dimension 0 of the first tensor is the batch; MACs are divided by its size. The other dimensions
            decide the MACs: use the resolution that the costs are to be for.
        names: The layers to measure, such as `SpaceChoices.names`.

    Returns:
        Profiles in the order of `names`.

    Raises:
        TypeError: A named module is neither `Conv2d` nor `Linear`, or there is no tensor in `example_inputs`.
        ValueError: A name is not in the model, a layer was never called, or the batch is empty.
    """
    layers = {name: _layer(model, name) for name in names}
    batch = _batch_size(example_inputs)
    macs = dict.fromkeys(layers, 0)

    def counter(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        macs_per_output = layers[name].weight[0].numel()

        def count(module: nn.Module, args: tuple, output: Tensor) -> None:
            macs[name] += output.numel() * macs_per_output

        return count

    with _left_as_found(model, example_inputs):
        handles = [layer.register_forward_hook(counter(name)) for name, layer in layers.items()]
        try:
            _call(model.eval(), example_inputs)
        finally:
            for handle in handles:
                handle.remove()
    unused = [name for name in layers if macs[name] == 0]
    if unused:
        raise ValueError(
            f"never called by the model's forward: {', '.join(map(repr, unused))}. Without a call a layer's "
            f"cost is unknown: give example_inputs that reach it, or take it out of the model"
        )
    return {
        name: LayerProfile(
            name=name,
            kind="Conv2d" if isinstance(layer, nn.Conv2d) else "Linear",
            macs=-(-macs[name] // batch),
            weight_numel=layer.weight.numel(),
            out_channels=layer.weight.shape[0],
        )
        for name, layer in layers.items()
    }


def policy_costs(profiles: Mapping[str, LayerProfile], policy: Policy) -> Costs:
    """Exact costs of a policy.

    Args:
        profiles: Of the policy's layers, no more and no fewer.
        policy: The bits of each layer.

    Raises:
        ValueError: The two are not about the same layers.
    """
    policy.check_against(list(profiles))
    totals = {
        metric: sum(cost(profiles[name], bits.weight_bits, bits.act_bits) for name, bits in policy.items())
        for metric, cost in METRICS.items()
    }
    return Costs(**totals)


def cost_tables(profiles: Mapping[str, LayerProfile], choices: SpaceChoices) -> dict[str, dict[str, np.ndarray]]:
    """The cost of every candidate of every layer.

    Args:
        profiles: Of all of `choices.names`.
        choices: The candidates.

    Returns:
        By metric and layer an int64 matrix ``[len(weight_bits), len(act_bits)]``. An excluded layer has its
        constant cost as a 1x1 matrix, so sums over the layers are the costs of whole policies.

    Raises:
        ValueError: A layer has no profile, or a total does not fit in 64 bits.
    """
    missing = [name for name in choices.names if name not in profiles]
    if missing:
        raise ValueError(f"profiles lacks layers of the search space: {', '.join(map(repr, missing))}")
    tables = {}
    for metric, cost in METRICS.items():
        exact = {
            name: _table(cost, profiles[name], choices.layers.get(name, LayerChoices((None,), (None,))))
            for name in choices.names
        }
        largest = sum(max(map(max, table)) for table in exact.values())
        if largest > np.iinfo(np.int64).max:
            raise ValueError(f"{metric} of the largest policy is {largest}, more than a 64-bit integer holds")
        tables[metric] = {name: np.array(table, dtype=np.int64) for name, table in exact.items()}
    return tables


def _table(cost: CostFunction, layer: LayerProfile, choices: LayerChoices) -> list[list[int]]:
    return [[cost(layer, w, a) for a in choices.act_bits] for w in choices.weight_bits]


def _layer(model: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        hint = did_you_mean(name, [n for n, _ in model.named_modules()])
        raise ValueError(f"the model has no module {name!r}{hint}") from None
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise TypeError(f"module {name!r} is a {type(layer).__name__}; costs are known for Conv2d and Linear")
    return layer


def _tensors(example_inputs: ExampleInputs) -> list[Tensor]:
    if isinstance(example_inputs, Tensor):
        return [example_inputs]
    values = example_inputs.values() if isinstance(example_inputs, dict) else example_inputs
    return [value for value in values if isinstance(value, Tensor)]


def _batch_size(example_inputs: ExampleInputs) -> int:
    tensors = _tensors(example_inputs)
    if not tensors:
        raise TypeError(f"example_inputs is {example_inputs!r}; it has no tensor, so no batch size")
    shape = tuple(tensors[0].shape)
    if not shape or shape[0] == 0:
        raise ValueError(f"example_inputs begins with shape {shape}; a batch of at least one is needed")
    return shape[0]


def _call(model: nn.Module, example_inputs: ExampleInputs) -> None:
    with torch.no_grad():
        if isinstance(example_inputs, Tensor):
            model(example_inputs)
        elif isinstance(example_inputs, dict):
            model(**example_inputs)
        else:
            model(*example_inputs)


@contextmanager
def _left_as_found(model: nn.Module, example_inputs: ExampleInputs) -> Iterator[None]:
    """Put training mode, buffers and random state back; a forward may replace a buffer or write into it."""
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    tensors = [*model.parameters(), *model.buffers(), *_tensors(example_inputs)]
    cuda_devices = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(cuda_devices)):
        try:
            yield
        finally:
            for module, training, buffers in modules:
                module.training = training
                module._buffers.clear()
                module._buffers.update(buffers)
            with torch.no_grad():
                for buffer, value in values:
                    buffer.copy_(value)
