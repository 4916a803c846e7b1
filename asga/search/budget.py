"""Budgets as people say them: a number, "1.2G", "1.5MB", "w4a4", "0.9*w4a4"."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from asga.policy import MAX_BITS, MIN_BITS
from asga.search.costs import LayerProfile, policy_costs
from asga.search.space import SpaceChoices

Amount = int | float | str

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{1,3}))?"
_QUANTITY = re.compile(_NUMBER + r"\s*([a-zA-Z]*)")
_WORD = re.compile(rf"(?:{_NUMBER}\s*\*\s*)?w(\d+)(?:a(\d+))?")
_PREFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_BYTES = {f"{prefix}B": factor for prefix, factor in (_PREFIXES | _BINARY).items()} | {"KB": 10**3, "": 1}


@dataclass(frozen=True)
class Budget:
    """Upper limits of a policy's costs; every limit that is given binds.

    A *word* names the cost of a uniform policy in the same search space: ``"w4a4"`` is what 4 bits for every
    searched weight and input would cost, pinned layers at their pins and excluded layers float. It may be
    scaled: ``"0.9*w4a4"``. Its bits are 2 to 8, candidates or not. Fractions are rounded down.

    Args:
        bitops: Bit operations of one sample: a number, a number with a decimal prefix (``"350M"``,
            ``"1.2G"``; k, M, G, T, P), or a word.
        size: Bytes of the quantized layers' weights and scales: a number, a number with a unit (``"800kB"``,
            ``"1.5MB"``, ``"2MiB"``), or a word, which may leave out the input's bits (``"w4"``): they do not
            change the size.

    Raises:
        TypeError: A limit is neither a number nor a string.
        ValueError: None is given, or one cannot be read or is not positive.
    """

    bitops: Amount | None = None
    size: Amount | None = None

    def __post_init__(self) -> None:
        if not self.to_dict():
            raise ValueError("a budget needs at least one limit, such as bitops='w4a4' or size='1.5MB'")
        for name, amount in self.to_dict().items():
            _read(name, amount)

    def __str__(self) -> str:
        units = {"bitops": " BitOps", "size": " bytes"}
        return ", ".join(
            f"{name} <= {amount}{'' if isinstance(amount, str) else units[name]}"
            for name, amount in self.to_dict().items()
        )

    def to_dict(self) -> dict[str, Amount]:
        """The limits that are given, as they were given; ``Budget(**budget.to_dict()) == budget``."""
        given = {"bitops": self.bitops, "size": self.size}
        return {name: amount for name, amount in given.items() if amount is not None}

    def limits(self, profiles: Mapping[str, LayerProfile], choices: SpaceChoices) -> dict[str, int]:
        """The limits in numbers, for one model.

        Args:
            profiles: Of all of `choices.names`.
            choices: The search space applied to the model; it decides what a word means.

        Returns:
            Limits by metric, as in `asga.search.costs`: ``"bitops"``, and ``"size_bits"`` in bits.

        Raises:
            ValueError: The profiles are not those of the space's layers.
        """
        limits = {}
        for name, amount in self.to_dict().items():
            metric, per_unit = ("size_bits", 8) if name == "size" else ("bitops", 1)
            factor, bits = _read(name, amount)
            if bits is not None:
                per_unit = getattr(policy_costs(profiles, choices.uniform(*bits)), metric)
            limits[metric] = math.floor(factor * per_unit)
        return limits


def _read(name: str, amount: Amount) -> tuple[Fraction, tuple[int, int] | None]:
    """An amount in units of the limit and None, or the factor of a word and its (weight bits, input bits)."""
    if isinstance(amount, str):
        factor, bits = _read_text(name, amount)
    elif isinstance(amount, int | float) and not isinstance(amount, bool):
        if not math.isfinite(amount):
            raise ValueError(f"{name} is {amount}; a finite number is needed")
        factor, bits = Fraction(amount), None
    else:
        raise TypeError(f"{name} is {amount!r}; a number or a string is needed")
    if factor <= 0:
        raise ValueError(f"{name} is {amount!r}; a limit above zero is needed")
    return factor, bits


def _read_text(name: str, text: str) -> tuple[Fraction, tuple[int, int] | None]:
    units = _BYTES if name == "size" else _PREFIXES
    if match := _WORD.fullmatch(text.strip()):
        mantissa, exponent, weight, act = match.groups()
        if act is None and name == "size":
            act = weight
        if act is not None:
            bits = int(weight), int(act)
            if not all(MIN_BITS <= b <= MAX_BITS for b in bits):
                raise ValueError(f"{name} is {text!r}; bits from {MIN_BITS} to {MAX_BITS} are supported")
            return _fraction(mantissa or "1", exponent), bits
    elif (match := _QUANTITY.fullmatch(text.strip())) and match[3] in units:
        return _fraction(match[1], match[2]) * units[match[3]], None
    examples = "'1.5MB', '2MiB', 'w4'" if name == "size" else "'350M', '1.2G', 'w4a4'"
    raise ValueError(f"{name} is {text!r}; a number is needed, or text such as {examples} or '0.9*w4a4'")


def _fraction(mantissa: str, exponent: str | None) -> Fraction:
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
