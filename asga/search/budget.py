"""Budgets as people say them: a number, "1.2G", "1.5MB", "5ms", "w4a4", "0.9*w4a4"."""

import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction

import numpy as np

from asga.policy import MAX_BITS, MIN_BITS
from asga.search.costs import METRICS, policy_cost
from asga.search.profiles import LayerProfile
from asga.search.space import SpaceChoices

Amount = int | float | str

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{1,3}))?"
_QUANTITY = re.compile(_NUMBER + r"\s*([a-zA-Zµμ]*)")
_WORD = re.compile(rf"(?:{_NUMBER}\s*\*\s*)?(?:w(\d+))?(?:a(\d+))?")
_PREFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_BYTES = {f"{prefix}B": factor for prefix, factor in (_PREFIXES | _BINARY).items()} | {"KB": 10**3, "": 1}
_THOUSANDTHS = {"m": 3, "u": 6, "µ": 6, "μ": 6, "n": 9}  # both signs for micro that keyboards and Unicode have
_SECONDS = {f"{p}s": Fraction(1, 10**power) for p, power in _THOUSANDTHS.items()} | {"s": 1, "": 1}


@dataclass(frozen=True)
class _Kind:
    """How a limit is written: its metric, and how many of the metric's units one of a plain number is."""

    metric: str
    per_unit: int
    units: Mapping[str, int | Fraction]
    plain: str
    examples: str
    word_needs: str = "wa"
    needs: str = "nothing"


_KINDS = {
    "bitops": _Kind("bitops", 1, _PREFIXES, " BitOps", "'350M', '1.2G', 'w4a4'"),
    "size": _Kind("size_bits", 8, _BYTES, " bytes", "'1.5MB', '2MiB', 'w4'", "w"),
    "act_memory": _Kind("act_memory_bits", 8, _BYTES, " bytes", "'64kB', '256KiB', 'a4'", "a", "sizes of inputs"),
    "latency": _Kind("latency_ns", 10**9, _SECONDS, " s", "'5ms', '300us', 'w8a8'", "wa", "a latency table"),
}
LIMIT_NAMES = tuple(_KINDS)


@dataclass(frozen=True)
class Budget:
    """Upper limits of a policy's costs; every limit that is given binds.

    A *word* names the cost of a uniform policy in the same search space: ``"w4a4"`` is what 4 bits for every
    searched weight and input would cost, pinned layers at their pins and excluded layers float. It may be
    scaled: ``"0.9*w4a4"``. Its bits are 2 to 8, candidates or not. Fractions are rounded down.

    Args:
        bitops: Bit operations of one sample: a number, a number with a decimal prefix (``"350M"``,
            ``"1.2G"``; k, M, G, T, P), or a word.
        size: Bytes of the quantized layers' weights, tied ones once, and scales: a number, a number with a unit
            (``"800kB"``, ``"1.5MB"``, ``"2MiB"``), or a word, which may leave out the input's bits (``"w4"``): they
            do not change the size.
        act_memory: Bytes of the largest quantized input of a layer, for one sample; see
            `asga.search.costs.layer_act_memory_bits`. As `size`, with words such as ``"a4"``.
        latency: Time of the quantizable layers: seconds as a number, a number with a unit (``"5ms"``, ``"300us"``),
            or a word. It needs a latency table: ``PolicySearcher(latency_table=...)``.

    Raises:
        TypeError: A limit is neither a number nor a string.
        ValueError: None is given, or one cannot be read or is not positive.
    """

    bitops: Amount | None = None
    size: Amount | None = None
    act_memory: Amount | None = None
    latency: Amount | None = None

    def __post_init__(self) -> None:
        if not self.to_dict():
            raise ValueError("a budget needs at least one limit, such as bitops='w4a4' or size='1.5MB'")
        for name, amount in self.to_dict().items():
            if isinstance(amount, numbers.Real) and not isinstance(amount, bool):
                # A number of NumPy's as Python's, which JSON knows; by its digits, as float32 has fewer of them. The
                # dataclass is frozen: values in their canonical form can only be put in place this way.
                if isinstance(amount, numbers.Integral):
                    amount = int(amount)
                else:
                    amount = float(str(amount) if isinstance(amount, np.floating) else amount)
                object.__setattr__(self, name, amount)
            _read(name, amount)

    def __str__(self) -> str:
        return ", ".join(
            f"{name} <= {amount}{'' if isinstance(amount, str) else _KINDS[name].plain}"
            for name, amount in self.to_dict().items()
        )

    def to_dict(self) -> dict[str, Amount]:
        """The limits that are given, as they were given; ``Budget(**budget.to_dict()) == budget``."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: amount for name, amount in given.items() if amount is not None}

    def limits(self, profiles: Mapping[str, LayerProfile], choices: SpaceChoices) -> dict[str, int]:
        """The limits in numbers, for one model.

        Args:
            profiles: Of all of `choices.names`.
            choices: The search space applied to the model; it decides what a word means.

        Returns:
            Limits by metric, as in `asga.search.costs`: ``"bitops"``, ``"size_bits"``, ``"act_memory_bits"``,
            ``"latency_ns"``.

        Raises:
            ValueError: The profiles are not those of the space's layers, or lack what a limit needs, or a word names
                a cost of zero.
        """
        limits = {}
        for name, amount in self.to_dict().items():
            kind, (factor, bits) = _KINDS[name], _read(name, amount)
            unknown = [layer for layer, profile in profiles.items() if not METRICS[kind.metric].known(profile)]
            if unknown:
                raise ValueError(f"a limit on {name} needs {kind.needs}, unknown for layer {unknown[0]!r}")
            per_unit = kind.per_unit
            if bits is not None:
                per_unit = policy_cost(profiles, choices.uniform(*bits), kind.metric)
                if per_unit == 0:
                    raise ValueError(f"{name} is {amount!r}, which costs nothing in this model: give a number")
            limits[kind.metric] = math.floor(factor * per_unit)
        return limits


def check_budget(name: str, budget: object) -> None:
    """Refuse what is given for the argument `name` and is no `Budget`.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(budget, Budget):
        limit = budget if isinstance(budget, str) and _WORD.fullmatch(budget) else "w4a4"
        raise TypeError(f"{name} is {budget!r}; a Budget is needed, such as Budget(bitops={limit!r})")


def _read(name: str, amount: Amount) -> tuple[Fraction, tuple[int, int] | None]:
    """An amount in units of the limit and None, or the factor of a word and its (weight bits, input bits)."""
    if isinstance(amount, str):
        factor, bits = _read_text(name, amount)
    elif isinstance(amount, int | float) and not isinstance(amount, bool):
        if not math.isfinite(amount):
            raise ValueError(f"{name} is {amount}; a finite number is needed")
        # As written: 0.009 is 9 milliseconds, not the binary number just below.
        factor, bits = Fraction(str(amount)), None
    else:
        raise TypeError(f"{name} is {amount!r}; a number or a string is needed")
    if factor <= 0:
        raise ValueError(f"{name} is {amount!r}; a limit above zero is needed")
    return factor, bits


def _read_text(name: str, text: str) -> tuple[Fraction, tuple[int, int] | None]:
    kind = _KINDS[name]
    if match := _WORD.fullmatch(text.strip()):
        mantissa, exponent, *given = match.groups()
        if all(bits is not None or side not in kind.word_needs for side, bits in zip("wa", given, strict=True)):
            bits = tuple(int(b if b is not None else next(filter(None, given))) for b in given)
            if not all(MIN_BITS <= b <= MAX_BITS for b in bits):
                raise ValueError(f"{name} is {text!r}; bits from {MIN_BITS} to {MAX_BITS} are supported")
            return _fraction(mantissa or "1", exponent), bits
    elif (match := _QUANTITY.fullmatch(text.strip())) and match[3] in kind.units:
        return _fraction(match[1], match[2]) * kind.units[match[3]], None
    raise ValueError(f"{name} is {text!r}; a number is needed, or text such as {kind.examples} or '0.9*w4a4'")


def _fraction(mantissa: str, exponent: str | None) -> Fraction:
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
