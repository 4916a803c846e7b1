"""What a policy costs: BitOps, size, activation memory and latency, in exact integers."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from asga.policy import FLOAT_BITS, FP4_BLOCK, Policy, WeightBits, bit_width, check_is_policy
from asga.search.profiles import LayerProfile
from asga.search.space import LayerChoices, SpaceChoices


@dataclass(frozen=True)
class Costs:
    """What a policy costs, by metric.

    Args:
        bitops: Bit operations of one sample, the sum of MACs x weight bits x input bits.
        size_bits: Bits to store the weights of the quantizable layers, tied ones once, and all scales.
        act_memory_bits: Bits of the largest quantized input of a layer, for one sample; None where the sizes of the
            inputs are not known.
        latency_ns: Nanoseconds that the quantizable layers take, one after the other; None without a table.
    """

    bitops: int
    size_bits: int
    act_memory_bits: int | None = None
    latency_ns: int | None = None

    @property
    def size_bytes(self) -> int:
        """`size_bits` in whole bytes, rounded up."""
        return -(-self.size_bits // 8)

    def to_dict(self) -> dict[str, int]:
        """The costs that are known, by metric."""
        return {metric: cost for metric, cost in asdict(self).items() if cost is not None}


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

    Layers with one weight parameter (tied ones) have one stored weight, with one set of scales, if they have the same
    bits: `policy_cost` and `cost_tables` count it once.
    """
    act_scale = 0 if act_bits is None else FLOAT_BITS
    return _weight_size_bits(layer, weight_bits) + act_scale


def _weight_size_bits(layer: LayerProfile, weight_bits: WeightBits | None) -> int:
    return layer.weight_numel * bit_width(weight_bits) + _weight_scale_bits(layer, weight_bits)


def _weight_scale_bits(layer: LayerProfile, weight_bits: WeightBits | None) -> int:
    if weight_bits is None:
        return 0
    if weight_bits == "fp4":
        blocks = -(-layer.weight_numel // (layer.out_channels * FP4_BLOCK))
        return layer.out_channels * blocks * bit_width("fp8") + FLOAT_BITS
    return layer.out_channels * FLOAT_BITS


def layer_act_memory_bits(layer: LayerProfile, weight_bits: WeightBits | None, act_bits: int | None) -> int:
    """Bits of a layer's quantized input, for one sample; the activation memory of a policy is the largest of them.

    Layers run one after the other and reuse the memory of those before, so what must fit into a device's fast memory
    is decided by the largest tensor, not by their sum. A layer's output counts as the input of the layer that reads
    it. Branches that wait for an addition, and what lies between two layers, are float or of an unknown precision
    here and not counted: the working memory of a runtime is more than this.

    Source:
        Uhlich et al., "Mixed Precision DNNs: All you need is a good parametrization" (DQ), ICLR 2020, whose third
        constraint it is. On microcontrollers a layer's output is held beside its input: Rusci et al., "Memory-Driven
        Mixed Low Precision Quantization for Enabling Deep Network Inference on Microcontrollers", MLSys 2020.
    """
    if layer.in_numel is None:
        raise ValueError(f"the size of the input of {layer.name!r} is not known")
    return layer.in_numel * bit_width(act_bits)


def layer_latency_ns(layer: LayerProfile, weight_bits: WeightBits | None, act_bits: int | None) -> int:
    """Nanoseconds of a layer, from its table (`asga.search.latency.LatencyTable`).

    The latency of a policy is their sum: of layers that run one after the other, without what is between them.

    Source:
        Cai et al., "ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware", ICLR 2019, section
        3.3: the latency of a network as the sum of a table's entries.
    """
    try:
        return layer.times[weight_bits, act_bits]
    except KeyError:
        raise ValueError(
            f"the latency table has no time for layer {layer.name!r} with {_shown(weight_bits)} weight bits and "
            f"{_shown(act_bits)} activation bits"
        ) from None


CostFunction = Callable[[LayerProfile, WeightBits | None, int | None], int]


@dataclass(frozen=True)
class Metric:
    """How a policy is measured.

    Args:
        cost: Of one layer with given weight and activation bits.
        peak: The cost of a policy is that of its dearest layer, not the sum over the layers.
        known: Whether a profile has what `cost` needs.
        of_weight: What of `cost` is for the weight alone, which a layer is spared if another has the same weight
            parameter with the same bits.
    """

    cost: CostFunction
    peak: bool = False
    known: Callable[[LayerProfile], bool] = lambda layer: True
    of_weight: Callable[[LayerProfile, WeightBits | None], int] = lambda layer, weight_bits: 0

    def total(self, costs: Iterable[int]) -> int:
        """The cost of a policy from those of its layers."""
        return max(costs, default=0) if self.peak else sum(costs)


METRICS: dict[str, Metric] = {
    "bitops": Metric(layer_bitops),
    "size_bits": Metric(layer_size_bits, of_weight=_weight_size_bits),
    "act_memory_bits": Metric(layer_act_memory_bits, peak=True, known=lambda layer: layer.in_numel is not None),
    "latency_ns": Metric(layer_latency_ns, known=lambda layer: bool(layer.latency_ns)),
}
PEAKS = frozenset(name for name, metric in METRICS.items() if metric.peak)


def known_metrics(profiles: Mapping[str, LayerProfile]) -> dict[str, Metric]:
    """The metrics for which all profiles have what is needed."""
    return {name: metric for name, metric in METRICS.items() if all(map(metric.known, profiles.values()))}


def policy_costs(profiles: Mapping[str, LayerProfile], policy: Policy) -> Costs:
    """Exact costs of a policy.

    Args:
        profiles: Of the policy's layers, no more and no fewer.
        policy: The bits of each layer.

    Raises:
        TypeError: `policy` is no `Policy`.
        ValueError: The two are not about the same layers, or a latency is not in the table.
    """
    check_is_policy(policy)
    return Costs(**{metric: policy_cost(profiles, policy, metric) for metric in known_metrics(profiles)})


def policy_cost(profiles: Mapping[str, LayerProfile], policy: Policy, metric: str) -> int:
    """The cost of a policy by one metric; see `policy_costs`."""
    policy.check_against(list(profiles))
    found = METRICS[metric]
    stored: set[tuple[str, WeightBits | None]] = set()

    def costs() -> Iterator[int]:
        for name, bits in policy.items():
            layer, weight = profiles[name], (profiles[name].tied_to or name, bits.weight_bits)
            spared = found.of_weight(layer, bits.weight_bits) if weight in stored else 0
            stored.add(weight)
            yield found.cost(layer, bits.weight_bits, bits.act_bits) - spared

    return found.total(costs())


def cost_tables(profiles: Mapping[str, LayerProfile], choices: SpaceChoices) -> dict[str, dict[str, np.ndarray]]:
    """Costs of every candidate pair of every layer.

    Args:
        profiles: Of all layers in `choices.names`.
        choices: The search space applied to the model.

    Returns:
        By metric and layer an int64 matrix ``[len(weight_bits), len(act_bits)]``, of the metrics that are known. An
        excluded layer has its constant cost as a 1x1 matrix, so sums over the layers (the largest entries, for
        `PEAKS`) are the costs of whole policies.

    Raises:
        ValueError: A layer has no profile, a total does not fit in 64 bits, or a latency is not in the table.
    """
    missing = [name for name in choices.names if name not in profiles]
    if missing:
        raise ValueError(f"profiles lacks layers of the search space: {', '.join(map(repr, missing))}")
    stored = _stored_by_others(profiles, choices)
    tables = {}
    for name, metric in known_metrics({layer: profiles[layer] for layer in choices.names}).items():
        exact = {
            layer: _table(metric, profiles[layer], _choices_of(choices, layer), stored[layer])
            for layer in choices.names
        }
        largest = metric.total(max(map(max, table)) for table in exact.values())
        if largest > np.iinfo(np.int64).max:
            raise ValueError(f"{name} of the largest policy is {largest}, more than a 64-bit integer holds")
        tables[name] = {layer: np.array(table, dtype=np.int64) for layer, table in exact.items()}
    return tables


def _table(
    metric: Metric, layer: LayerProfile, choices: LayerChoices, stored: Collection[WeightBits | None]
) -> list[list[int]]:
    spared = [metric.of_weight(layer, w) if w in stored else 0 for w in choices.weight_bits]
    return [
        [metric.cost(layer, w, a) - less for a in choices.act_bits]
        for w, less in zip(choices.weight_bits, spared, strict=True)
    ]


def _stored_by_others(profiles: Mapping[str, LayerProfile], choices: SpaceChoices) -> dict[str, set[WeightBits | None]]:
    """By layer the weight bits with which another layer has its weight in store already, whatever is chosen.

    Of tied layers, those whose bits are given store one weight for each of them, and the searched ones, which a group
    makes choose alike, one more unless they choose the same. So costs of whole policies stay sums over layers.
    """
    groups = {name: k for k, g in enumerate(choices.groups) if "weight" in g.sides for name in g.layers}
    given: dict[str, set[WeightBits | None]] = {}
    seen: set[tuple[str, int]] = set()
    stored: dict[str, set[WeightBits | None]] = {}
    # Layers without a choice first: what they store is there for the others.
    for name in sorted(choices.names, key=lambda name: len(_choices_of(choices, name).weight_bits) > 1):
        bits, weight = _choices_of(choices, name).weight_bits, profiles[name].tied_to or name
        stored[name] = set(given.setdefault(weight, set()))
        if len(bits) == 1:
            given[weight].update(bits)
        elif name in groups:
            if (weight, groups[name]) in seen:
                stored[name].update(bits)
            seen.add((weight, groups[name]))
    return stored


def _choices_of(choices: SpaceChoices, name: str) -> LayerChoices:
    """Those of a layer; an excluded one stays float."""
    return choices.layers.get(name, LayerChoices((None,), (None,)))


def _shown(bits: WeightBits | None) -> str:
    return "float" if bits is None else str(bits)
