"""The search space: which bit-widths each layer of a model may have."""

import numbers
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from asga.nn.quantizable import find_quantizable, second_names, tied_layers, unwrapped
from asga.ops.functional import MAX_CANDIDATES
from asga.policy import LayerPolicy, Policy, WeightBits, bit_width, check_bits, check_weight_bits, did_you_mean
from asga.search.groups import RULES, SIDES, Group, find_groups, is_names, joined
from asga.search.profiles import ExampleInputs
from asga.targets import check_target, find_target

Pin = int | tuple[WeightBits, int | None]

_DEFAULT_BITS = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class LayerChoices:
    """The candidates of one layer, ascending in bits; ``(None,)`` where the tensor stays float.

    A `pinned` layer has one candidate for each and is not searched.
    """

    weight_bits: tuple[WeightBits | None, ...]
    act_bits: tuple[int | None, ...]
    pinned: bool = False


@dataclass(frozen=True)
class SpaceChoices:
    """A search space applied to one model.

    Args:
        layers: The layers to quantize, searched and pinned, in the order the model registers them.
        skipped: Why other layers with a weight stay float, by name; the excluded ones are among them.
        names: All layers that could be quantized, in the order the model registers them: those in `layers`
            and the excluded ones. Costs and policies are about these.
        groups: Searched layers that share bits, each named exactly; no layer is in two groups that share the same.
            Those with one weight parameter share its bits.
        target: Where the model will run.
    """

    layers: dict[str, LayerChoices]
    skipped: dict[str, str]
    names: tuple[str, ...]
    groups: tuple[Group, ...] = ()
    target: str = "any"

    @property
    def excluded(self) -> tuple[str, ...]:
        """Layers that could be quantized but stay float.

        Costs count them, as 32 bits, and policies have them with None for both bit-widths.
        """
        return tuple(name for name in self.names if name not in self.layers)

    @property
    def decisions(self) -> tuple[tuple[str, str], ...]:
        """What a policy decides: layers and sides, ``"weight"`` or ``"act"``, that have more than one candidate.

        What a group shares is one decision, and there with its first layer.
        """
        followers = {(name, side) for group in self.groups for side in group.sides for name in group.layers[1:]}
        return tuple(
            (name, side)
            for name, layer in self.layers.items()
            for side in SIDES
            if len(getattr(layer, f"{side}_bits")) > 1 and (name, side) not in followers
        )

    def uniform(
        self, weight_bits: WeightBits, act_bits: int | None, meta: Mapping[str, object] | None = None
    ) -> Policy:
        """The policy that gives every searched layer the same bits, candidates or not.

        Pinned layers keep their pins, and excluded layers and inputs that are not quantized stay float, as in every
        policy of this space.
        """
        bits = {
            name: LayerPolicy(c.weight_bits[0], c.act_bits[0])
            if c.pinned
            else LayerPolicy(weight_bits, None if c.act_bits == (None,) else act_bits)
            for name, c in self.layers.items()
        }
        return self._policy(bits, meta)

    def uniform_choice(self, weight_bits: WeightBits, act_bits: int | None) -> dict[str, tuple[int, int]]:
        """The same as indices into the candidates, for `policy`.

        Raises:
            ValueError: A searched layer does not have these candidates.
        """
        return {
            name: (0, 0) if c.pinned else (c.weight_bits.index(weight_bits), c.act_bits.index(act_bits))
            for name, c in self.layers.items()
        }

    def policy(self, chosen: Mapping[str, tuple[int, int]], meta: Mapping[str, object] | None = None) -> Policy:
        """The policy of one candidate per layer.

        Args:
            chosen: Per layer the indices into its `weight_bits` and `act_bits`, as `asga.search.solver.solve`
                returns them.
            meta: Metadata of the policy.
        """
        bits = {
            name: LayerPolicy(c.weight_bits[chosen[name][0]], c.act_bits[chosen[name][1]])
            for name, c in self.layers.items()
        }
        return self._policy(bits, meta)

    def _policy(self, bits: dict[str, LayerPolicy], meta: Mapping[str, object] | None) -> Policy:
        stays_float = LayerPolicy(None, None)
        return Policy({name: bits.get(name, stays_float) for name in self.names}, meta)


@dataclass(frozen=True)
class SearchSpace:
    """Which bit-widths the layers of a model may have.

    Weights may also have small floats: ``"fp8"`` (E4M3) and ``"fp4"`` (E2M1 in blocks of 16), beside integers or
    alone; see `asga.nn.FloatWeightQuantizer`. Patterns are those of `fnmatch` (``"layer1.*"``, ``"*.downsample.0"``,
    or an exact name), matched case-sensitively against the names of the model's quantizable layers. When several pins
    match a layer the last one counts; when a layer is both pinned and excluded it is excluded.

    Args:
        weight_bits: Candidates for the weights: 2 to 8, ``"fp4"``, ``"fp8"``; kept in ascending order of their bits.
        act_bits: Candidates for the inputs of the layers, 2 to 8; None leaves the inputs float.
        first_last: Bits of the model's first and last quantizable layer, in registration order, unless
            `pinned` says otherwise: an integer for weight and input (weight alone if `act_bits` is None), a pair
            ``(weight_bits, act_bits)`` (the latter None for a float input), or None to search them like the others. 8
            bits are customary: Esser et al.,
            "Learned Step Size Quantization", ICLR 2020.
        pinned: Bits by pattern, an integer or a pair, of layers that are quantized but not searched.
        exclude: Patterns of layers that stay float.
        target: Where the model will run, a name in `asga.targets.TARGETS`; what that cannot run is refused when the
            space is applied to a model. ``"any"`` restricts nothing.
        formats: In place of `weight_bits`, and of `act_bits` unless that is given too: the candidates by name,
            ``"int2"`` to ``"int8"`` for weights and inputs, ``"fp4"`` and ``"fp8"`` for weights.
        groups: Layers that must share bits. Each entry is a rule, ``"residual"``, ``"qkv"`` or ``"depthwise"`` (see
            `asga.search.groups.find_groups`), or the layers themselves: a `Group` with names or patterns and what they
            share, or a sequence of names or patterns that share weight and activation bits. Groups that overlap are
            joined. Pinned and excluded layers are left out: they have nothing to share. Searched layers that have one
            weight parameter (tied ones) share its bits without being asked: it is stored once.

    Raises:
        TypeError: A bit-width is neither an integer nor a name, `pinned` no mapping, or `exclude` or a group not a
            sequence of strings.
        ValueError: A bit-width is outside 2..8 or given twice, a format, a target or a rule unknown, or there are no or
            too many candidates.
    """

    weight_bits: Sequence[WeightBits] = _DEFAULT_BITS
    act_bits: Sequence[int] | None = _DEFAULT_BITS
    first_last: Pin | None = 8
    pinned: Mapping[str, Pin] = field(default_factory=dict)
    exclude: Sequence[str] = ()
    target: str = "any"
    formats: InitVar[Sequence[str] | None] = None
    groups: Sequence[str | Group | Sequence[str]] = ()

    def __post_init__(self, formats: Sequence[str] | None) -> None:
        weight_bits, act_bits = self.weight_bits, self.act_bits
        if formats is not None:
            if weight_bits is not _DEFAULT_BITS:
                raise ValueError(f"formats is {formats!r} and weight_bits is {weight_bits!r}; give one of them")
            weight_bits = _candidates("formats", formats, check_weight_bits)
            integers = tuple(bits for bits in weight_bits if isinstance(bits, int))
            if act_bits is _DEFAULT_BITS:
                if not integers:
                    raise ValueError(
                        f"formats is {formats!r}, with no integer for the inputs: give act_bits, or act_bits=None to "
                        f"leave the inputs float"
                    )
                act_bits = integers
        find_target(self.target)
        if not is_names(self.exclude):
            raise TypeError(f"exclude is {self.exclude!r}; a sequence of name patterns is needed")
        if not isinstance(self.pinned, Mapping) or not is_names(self.pinned):
            raise TypeError(f"pinned is {self.pinned!r}; bits by pattern are needed, such as {{'conv1': 8}}")
        first_last = None if self.first_last is None else _pair("first_last", self.first_last)
        if act_bits is None and isinstance(self.first_last, numbers.Integral):
            first_last = (first_last[0], None)
        pinned = {pattern: _pair(f"pinned[{pattern!r}]", pin) for pattern, pin in self.pinned.items()}
        # The dataclass is frozen: values in their canonical form can only be put in place this way.
        object.__setattr__(self, "weight_bits", _candidates("weight_bits", weight_bits, check_weight_bits))
        if act_bits is not None:
            object.__setattr__(self, "act_bits", _candidates("act_bits", act_bits, check_bits))
        object.__setattr__(self, "first_last", first_last)
        object.__setattr__(self, "pinned", pinned)
        object.__setattr__(self, "exclude", tuple(self.exclude))
        object.__setattr__(self, "groups", _groups(self.groups))

    @property
    def runs_the_model(self) -> bool:
        """Whether `choices` needs `example_inputs`: a rule finds its groups by running the model."""
        return any(isinstance(group, str) for group in self.groups)

    def choices(self, model: nn.Module, example_inputs: ExampleInputs | None = None) -> SpaceChoices:
        """Apply the space to a model.

        Args:
            model: Any module; it is looked at, and run once if there are rules in `groups`, but not changed.
            example_inputs: What to run it with: a tensor, positional arguments, or a dict of keyword arguments. Any
                resolution will do.

        Returns:
            The candidates of every quantizable layer, why other layers stay float, and the groups.

        Raises:
            ValueError: A pattern matches no quantizable layer, no layer is left to search, the target cannot run what
                could be chosen, the model is in parts compiled, a group named by hand has not two searched layers, or
                `example_inputs` is needed.
        """
        model = unwrapped(model)
        quantizable, skipped = find_quantizable(model)
        names = list(quantizable)
        if not names:
            raise ValueError(f"the model has no layer that can be quantized{_reasons(skipped)}")
        known = _Names(tuple(names), skipped, second_names(model))
        excluded = [name for p in self.exclude for name in known.matching("exclude", p)]
        pins = {}
        if self.first_last is not None:
            pins = dict.fromkeys((names[0], names[-1]), self.first_last)
        for pattern, pin in self.pinned.items():
            pins |= dict.fromkeys(known.matching("pinned", pattern), pin)

        layers = {}
        for name in names:
            if name in excluded:
                continue
            if name in pins:
                weight_bits, act_bits = pins[name]
                layers[name] = LayerChoices((weight_bits,), (act_bits,), pinned=True)
            else:
                layers[name] = LayerChoices(self.weight_bits, self.act_bits or (None,))
        if all(c.pinned for c in layers.values()):
            raise ValueError(
                f"no layer is left to search: {len(layers)} of {len(names)} quantizable layers are pinned, "
                f"{len(names) - len(layers)} excluded. first_last={self.first_last!r} is the rule for "
                f"{names[0]!r} and {names[-1]!r}; first_last=None searches them too"
            )
        check_target(self.target, quantizable, {n: (c.weight_bits, c.act_bits) for n, c in layers.items()})
        reasons = dict.fromkeys(excluded, "excluded by the search space")
        groups = self._find_groups(model, example_inputs, known, layers, tied_layers(quantizable))
        return SpaceChoices(layers, skipped | reasons, tuple(names), groups, self.target)

    def _find_groups(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs | None,
        known: "_Names",
        layers: Mapping[str, LayerChoices],
        tied: Mapping[str, str],
    ) -> tuple[Group, ...]:
        """The groups with exact names, only of searched layers; overlapping ones joined, in the order of the layers."""
        if self.runs_the_model and example_inputs is None:
            rules = ", ".join(group for group in self.groups if isinstance(group, str))
            raise ValueError(f"groups has rules ({rules}), which need example_inputs to run the model with")
        searched = [name for name, choices in layers.items() if not choices.pinned]
        found = []
        for k, group in enumerate(self.groups):
            if isinstance(group, str):
                # All layers are followed, so that none is looked through.
                found += find_groups(model, example_inputs, known.layers, group)
                continue
            argument = f"groups[{k}]"
            members = {name for p in group.layers for name in known.matching(argument, p)}
            if len(members.intersection(searched)) < 2:
                raise ValueError(f"{argument} is {group}; at least two layers that are searched are needed")
            found.append(Group(tuple(members), group.share))
        for first in dict.fromkeys(tied.values()):
            found.append(Group(tuple(name for name in tied if tied[name] == first), "weight"))
        shared: dict[str, set[tuple[str, ...]]] = {}
        for side, bits in zip(SIDES, (self.weight_bits, self.act_bits), strict=True):
            chosen = [group for group in found if side in group.sides and bits is not None]
            members = [set(group.layers).intersection(searched) for group in chosen]
            shared[side] = {tuple(sorted(g, key=searched.index)) for g in joined(members) if len(g) > 1}
        both = shared["weight"] & shared["act"]
        groups = [Group(names, side) for side in SIDES for names in shared[side] - both]
        groups += [Group(names) for names in both]
        return tuple(sorted(groups, key=lambda group: (searched.index(group.layers[0]), group.share)))


def _candidates(
    name: str, bits: Sequence[WeightBits], check: Callable[[str, object], WeightBits]
) -> tuple[WeightBits, ...]:
    if isinstance(bits, str) or not isinstance(bits, Sequence):
        raise TypeError(f"{name} is {bits!r}; a sequence of integers is needed")
    candidates = [check(f"{name}[{k}]", value) for k, value in enumerate(bits)]
    if not candidates or sum(isinstance(value, int) for value in candidates) > MAX_CANDIDATES:
        raise ValueError(f"{name} has {len(bits)} candidates; between 1 and {MAX_CANDIDATES} are supported")
    if len(set(candidates)) < len(candidates):
        raise ValueError(f"{name} is {tuple(bits)}; each candidate may be there only once")
    return tuple(sorted(candidates, key=lambda value: (bit_width(value), isinstance(value, str))))


def _pair(name: str, pin: Pin) -> tuple[WeightBits, int | None]:
    if isinstance(pin, Sequence) and not isinstance(pin, str) and len(pin) == 2:
        weight_bits = check_weight_bits(f"{name}[0]", pin[0])
        return weight_bits, None if pin[1] is None else check_bits(f"{name}[1]", pin[1])
    if isinstance(pin, numbers.Integral):
        bits = check_bits(name, pin)
        return bits, bits
    raise TypeError(f"{name} is {pin!r}; an integer or a pair (weight_bits, act_bits) is needed")


def _groups(groups: Sequence[str | Group | Sequence[str]]) -> tuple[str | Group, ...]:
    if isinstance(groups, str) or not isinstance(groups, Collection):
        raise TypeError(f"groups is {groups!r}; a sequence of rules or groups is needed, such as ({groups!r},)")
    checked = []
    for group in groups:
        if isinstance(group, str):
            if group not in RULES:
                raise ValueError(
                    f"groups has {group!r}, which is no rule; rules are {', '.join(RULES)}, others a Group or layers"
                )
        elif isinstance(group, Mapping):  # as `dataclasses.asdict` and JSON have it
            group = Group(**group)
        elif not isinstance(group, Group):
            group = Group(group)
        checked.append(group)
    return tuple(checked)


@dataclass(frozen=True)
class _Names:
    """The names in a model that patterns are held against.

    Args:
        layers: Of the quantizable layers.
        skipped: Why other layers stay float, by name.
        second: The first name of a module by each of its further ones.
    """

    layers: tuple[str, ...]
    skipped: Mapping[str, str]
    second: Mapping[str, str]

    def matching(self, argument: str, pattern: str) -> list[str]:
        """The layers that a pattern given in `argument` matches.

        Raises:
            ValueError: None; the message says what is known of the modules that it matches, or the nearest names.
        """
        found = [name for name in self.layers if fnmatchcase(name, pattern)]
        if not found:
            also = {name: f"the same layer as {first!r}: use that name" for name, first in self._shared_layers()}
            reasons = {name: why for name, why in {**self.skipped, **also}.items() if fnmatchcase(name, pattern)}
            hint = _reasons(reasons) if reasons else did_you_mean(pattern, [*self.layers, *also])
            raise ValueError(f"{argument}: the pattern {pattern!r} matches no quantizable layer{hint}")
        return found

    def _shared_layers(self) -> Iterator[tuple[str, str]]:
        return ((name, first) for name, first in self.second.items() if first in self.layers)


def _reasons(skipped: Mapping[str, str]) -> str:
    return "".join(f"\n  {name!r}: {why}" for name, why in skipped.items())
