"""Checks of what is handed to trainers: a message names the argument, its value and what would be right."""

import math
import numbers

import numpy as np
import torch


def check_count(name: str, value: object, least: int = 1) -> int:
    """An integer that is not too small.

    Returns:
        `value`, as Python's if it is one of NumPy's: checkpoints and JSON hold no others.

    Raises:
        TypeError: It is no integer.
        ValueError: It is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}; an integer is needed")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
    return int(value)


def check_number(name: str, value: object, *, below: float = math.inf) -> int | float:
    """A finite number that is not negative.

    Args:
        name: Of the argument.
        value: What was given for it.
        below: What it must not reach.

    Returns:
        `value`, as Python's if it is one of NumPy's.

    Raises:
        TypeError: It is no number.
        ValueError: It is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; a number is needed")
    if not 0 <= value < below:
        upper = "finite" if below == math.inf else f"below {below:g}"
        raise ValueError(f"{name} is {value}; it must be {upper} and not negative")
    return plain(value)


def plain(value: object) -> object:
    """A number of NumPy's as Python's; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def check_instance(name: str, value: object, kind: type | tuple[type, ...], needed: str) -> None:
    """An object of some class.

    Raises:
        TypeError: It is of another; `needed` says what is needed.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}; {needed} is needed")


def check_call(name: str, value: object, *, or_none: bool = False) -> None:
    """Something that can be called; None, too, where that is allowed.

    Raises:
        TypeError: It is something else.
    """
    if not (callable(value) or (or_none and value is None)):
        raise TypeError(f"{name} is {value!r}; a function{', or None,' if or_none else ''} is needed")


def check_autocast(autocast: object) -> None:
    """A dtype to run a model in under autocast, or None.

    Raises:
        TypeError: It is neither.
        ValueError: It is a dtype that autocast has not.
    """
    check_instance("autocast", autocast, (torch.dtype, type(None)), "a dtype such as torch.bfloat16, or None,")
    if autocast not in (torch.bfloat16, torch.float16, None):
        raise ValueError(f"autocast is {autocast}; it must be torch.bfloat16, torch.float16 or None")
