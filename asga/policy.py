"""A bit-width policy, the result of a search: how many bits the weight and the input of each layer have."""

import copy
import difflib
import json
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from asga._checks import check_instance
from asga._files import write_json

MIN_BITS, MAX_BITS = 2, 8
FLOAT_BITS = 32  # what a tensor that stays float counts in every cost
# Small floats that a weight may be stored in, and what one value of them counts: E2M1 in blocks, and E4M3.
SMALL_FLOATS = {"fp4": 4, "fp8": 8}
# NVFP4: so many values of fp4 share a block scale. MXFP4 (32 values, scales that are powers of two) is coarser, and
# TensorRT takes blocks of 16: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/_static/operators/DynamicQuantize.html
FP4_BLOCK = 16
_FORMAT, _VERSION = "asga.policy", 2
_KEYS = ("format", "version", "layers", "meta")

# An integer grid by its bits, or a small float by its name.
WeightBits = int | str


@dataclass(frozen=True)
class LayerPolicy:
    """The bit-widths of one layer.

    Args:
        weight_bits: 2 to 8, ``"fp4"`` or ``"fp8"`` (see `asga.nn.FloatWeightQuantizer`), or None: the weight stays
            float and is counted as 32 bits. ``"int4"`` is 4.
        act_bits: 2 to 8 for the layer's input, or None.

    Raises:
        TypeError: A bit-width is of another type.
        ValueError: A bit-width is outside 2..8, or the name of no format.
    """

    weight_bits: WeightBits | None
    act_bits: int | None

    def __post_init__(self) -> None:
        if self.weight_bits is not None:
            # The dataclass is frozen: the canonical form can only be put in place this way.
            object.__setattr__(self, "weight_bits", check_weight_bits("weight_bits", self.weight_bits))
        if self.act_bits is not None:
            object.__setattr__(self, "act_bits", check_bits("act_bits", self.act_bits))

    def __str__(self) -> str:
        """Such as ``"w4a8"``; ``"w4"`` where the input stays float, ``"float"`` where both do."""
        sides = (("w", self.weight_bits), ("a", self.act_bits))
        return "".join(f"{side}{bits}" for side, bits in sides if bits is not None) or "float"


class Policy(Mapping[str, LayerPolicy]):
    """An immutable mapping from layer name to its bit-widths, in the order of the model's layers.

    Two policies are equal when they give the same layers the same bits, whatever their `meta`.

    Args:
        layers: Bit-widths by the name of the module in the model. A layer that is to stay float is in the
            policy with None for both.
        meta: Where the policy comes from (architecture, proxy, budget, costs): anything that JSON can hold.
            The key ``"architecture"``, if there, is shown when the policy does not fit a model.

    Raises:
        TypeError: A name is not a string, a value not a `LayerPolicy`, or `meta` not JSON.
        ValueError: There is no layer, or `meta` has NaN or an infinity.
    """

    def __init__(self, layers: Mapping[str, LayerPolicy], meta: Mapping[str, object] | None = None) -> None:
        for name, layer in layers.items():
            if not isinstance(name, str):
                raise TypeError(f"layer name {name!r} is not a string")
            if not isinstance(layer, LayerPolicy):
                raise TypeError(f"layer {name!r} is {layer!r}; a LayerPolicy is needed")
        if not layers:
            raise ValueError("a policy needs at least one layer")
        self._layers = dict(layers)
        self._meta = plain_json(dict(meta or {}))

    @property
    def meta(self) -> dict[str, object]:
        """A copy of the metadata, as plain JSON values."""
        return copy.deepcopy(self._meta)

    def __getitem__(self, name: str) -> LayerPolicy:
        try:
            return self._layers[name]
        except KeyError:
            raise UnknownLayerError(f"no layer {name!r} in the policy{did_you_mean(name, self)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Policy({len(self)} layers: {' '.join(map(str, self.values()))})"

    def __str__(self) -> str:
        width = max(len("layer"), *(len(name) for name in self))
        rows = [("layer", "weight", "act")]
        rows += [(name, _shown(layer.weight_bits), _shown(layer.act_bits)) for name, layer in self.items()]
        return "\n".join(f"{name:<{width}}  {weight:>6}  {act:>5}" for name, weight, act in rows)

    def check_against(self, names: Sequence[str], second_names: Mapping[str, str] | None = None) -> None:
        """Check that the policy says something about each of a model's layers, and about no other.

        Args:
            names: The model's quantizable layers.
            second_names: The first name of a module by each of its further ones
                (`asga.nn.quantizable.second_names`), for messages.

        Raises:
            ValueError: The policy has layers that the model has not (the nearest names are shown), or the
                other way round. When most layers are unknown, the message says that the policy belongs to
                another architecture.
        """
        known, second = set(names), second_names or {}
        unknown = [name for name in self if name not in known]
        if again := [name for name in unknown if second.get(name) in known]:
            lines = [f"  {name!r}: the same layer as {second[name]!r}: use that name" for name in again]
            raise ValueError("layers of the policy by names that the model has second:\n" + "\n".join(lines))
        if 2 * len(unknown) > len(self):
            made_for = self._meta.get("architecture")
            raise ValueError(
                f"the policy is for another architecture{f', {made_for}' if made_for else ''}: "
                f"{len(unknown)} of {len(self)} layers of the policy are not in the model. "
                f"Only in the policy: {_listed(unknown)}. Layers of the model: {_listed(names)}"
            )
        if unknown:
            lines = [f"  {name!r}{did_you_mean(name, names)}" for name in unknown]
            raise ValueError("layers of the policy that are not in the model:\n" + "\n".join(lines))
        missing = [name for name in names if name not in self._layers]
        if missing:
            raise ValueError(
                f"layers of the model that the policy does not mention: {_listed(missing)}. To leave a layer "
                f"float, put it in the policy with None (null in JSON) for both bit-widths"
            )

    def to_dict(self) -> dict[str, object]:
        """The policy as plain JSON values; `from_dict` reads them back.

        Its version is 2 if there is a small float, which readers of version 1 do not know, and 1 otherwise.
        """
        layers = {name: asdict(layer) for name, layer in self.items()}
        version = 2 if any(layer.weight_bits in SMALL_FLOATS for layer in self.values()) else 1
        return {"format": _FORMAT, "version": version, "layers": layers, "meta": self.meta}

    @classmethod
    def from_dict(cls, data: object) -> "Policy":
        """Read what `to_dict` gives.

        Raises:
            ValueError: It is not a policy, is of a newer version, or a key or an entry is wrong; the message names it.
        """
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f'not a policy: a JSON object with "format": "{_FORMAT}" is needed')
        version = data.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError(f"version is {version!r}; a positive integer is needed")
        if version > _VERSION:
            raise ValueError(
                f"written by a newer asga (policy version {version}); this one reads version <= {_VERSION}"
            )
        for key in data.keys() - _KEYS:
            hint = did_you_mean(key, _KEYS) or f"; those are {', '.join(_KEYS)}, and meta takes what else is to be said"
            raise ValueError(f"the key {key!r} is not one of a policy{hint}")
        layers, meta = data.get("layers"), data.get("meta", {})
        for key, value in (("layers", layers), ("meta", meta)):
            if not isinstance(value, dict):
                raise ValueError(f"{key} is {value!r}; a JSON object is needed")
        return cls({name: _read_layer(name, entry) for name, entry in layers.items()}, meta)

    def save(self, path: str | os.PathLike) -> None:
        """Write the policy as JSON, atomically: a file that was there is replaced at once or left alone."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Policy":
        """Read a policy file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not JSON (with line and column), has a key twice, or is not a valid policy.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no policy file at {str(path)!r}")
        try:
            return cls.from_dict(json.loads(path.read_bytes(), object_pairs_hook=_unique_keys))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


class UnknownLayerError(KeyError):
    """A layer name that is not there. Unlike that of a bare `KeyError`, its text is shown without quotes."""

    def __str__(self) -> str:
        return self.args[0]


def check_is_policy(policy: object) -> None:
    """Refuse what is given for the argument `policy` and is no `Policy`.

    Raises:
        TypeError: It is none.
    """
    check_instance("policy", policy, Policy, "a Policy (Policy.load reads one from a file)")


def check_bits(name: str, bits: object) -> int:
    """Check a bit-width given for the argument `name`.

    Returns:
        `bits`, an integer in 2..8, as Python's if it is one of NumPy's.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is outside 2..8.
    """
    if not isinstance(bits, numbers.Integral) or isinstance(bits, bool):
        raise TypeError(f"{name} is {bits!r}; an integer from {MIN_BITS} to {MAX_BITS} is needed")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{name} is {bits}; supported are {MIN_BITS} to {MAX_BITS}")
    return int(bits)


def check_weight_bits(name: str, bits: object) -> WeightBits:
    """Check what is given for the argument `name` as the format of a weight.

    Returns:
        An integer in 2..8, also for names like ``"int4"``, or ``"fp4"`` or ``"fp8"``.

    Raises:
        TypeError: It is neither an integer nor a string.
        ValueError: It is an integer outside 2..8, or the name of no format.
    """
    if not isinstance(bits, str):
        return check_bits(name, bits)
    integers = {f"int{width}": width for width in range(MIN_BITS, MAX_BITS + 1)}
    known = integers | {small: small for small in SMALL_FLOATS}
    if bits not in known:
        raise ValueError(f"{name} is {bits!r}; supported are {', '.join(known)}")
    return known[bits]


def bit_width(bits: WeightBits | None) -> int:
    """What one value counts in costs: the bits of an integer or of a small float, 32 for None."""
    return FLOAT_BITS if bits is None else SMALL_FLOATS.get(bits, bits)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of an error message about an unknown `name`: up to three of `names` that look like it."""
    nearest = difflib.get_close_matches(name, list(names), n=3)
    return f"; did you mean {' or '.join(repr(n) for n in nearest)}?" if nearest else ""


def plain_json(meta: dict[str, object]) -> dict[str, object]:
    """A copy of `meta` as JSON would give it back, so that a saved policy equals the loaded one."""
    try:
        return json.loads(json.dumps(meta, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(f"meta cannot be kept as JSON: {error}") from error


def _read_layer(name: str, entry: object) -> LayerPolicy:
    keys = {"weight_bits", "act_bits"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise ValueError(f"layer {name!r} is {entry!r}; an object with weight_bits and act_bits is needed")
    try:
        return LayerPolicy(**entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"layer {name!r}: {error}, or null for float") from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object; the parser's default would silently keep the last of two equal keys."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return result


def _listed(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def _shown(bits: WeightBits | None) -> str:
    return "float" if bits is None else str(bits)
