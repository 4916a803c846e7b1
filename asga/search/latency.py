"""Latency tables: how long each layer takes on a device, by its bits."""

import csv
import io
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from asga._batches import to_device
from asga._files import write_atomic
from asga.policy import LayerPolicy
from asga.search.measured_latency import measure_layers
from asga.search.profiles import ExampleInputs, LayerProfile
from asga.search.space import LayerChoices, SearchSpace, SpaceChoices

Bits = int | None
Entry = tuple[str, Bits, Bits]

_UNITS = {"seconds": 10**9, "milliseconds": 10**6, "microseconds": 10**3, "nanoseconds": 1}
_COLUMNS = ("layer", "weight_bits", "act_bits")
_MOST_SHOWN = 10


@dataclass(frozen=True)
class LatencyTable:
    """How long layers take, for a limit on the latency: `Budget` and ``PolicySearcher(latency_table=...)``.

    A policy takes the sum of its layers' times, as if they ran one after the other and nothing came between. Times are
    whole nanoseconds, so that limits are exact.

    Args:
        times: By layer, weight bits and activation bits, in nanoseconds; None stands for a tensor that stays float.
        kernels: By the same, what was measured, for information; may be empty.

    Raises:
        TypeError: A time is not an integer.
        ValueError: A time is negative, an entry is there twice, or bits are not supported.
    """

    times: Mapping[Entry, int]
    kernels: Mapping[Entry, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        times, kernels = {}, {}
        for (layer, weight_bits, act_bits), time in self.times.items():
            if isinstance(time, bool) or not isinstance(time, numbers.Integral):
                raise TypeError(f"the time of {layer!r} is {time!r}; whole nanoseconds are needed")
            if time < 0:
                raise ValueError(f"the time of {layer!r} is {time} ns; it must not be negative")
            entry = _entry(layer, weight_bits, act_bits)
            if entry in times:
                raise ValueError(f"{_named(entry)} is there twice")
            times[entry] = int(time)  # NumPy's would overflow
            if (layer, weight_bits, act_bits) in self.kernels:
                kernels[entry] = self.kernels[layer, weight_bits, act_bits]
        # Only so are values of a frozen dataclass put in place.
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "kernels", kernels)

    @classmethod
    def from_csv(cls, path: str | os.PathLike) -> "LatencyTable":
        """Read a table, of whatever origin: a profiler on the target, a simulator, a vendor's tool.

        The first line names the columns: ``layer``, ``weight_bits``, ``act_bits``, and one of ``seconds``,
        ``milliseconds``, ``microseconds`` and ``nanoseconds``. A column ``kernel`` may say what was measured; others
        are ignored. Bits are numbers, or ``float`` for a tensor that stays float. Times are rounded to nanoseconds.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A column is missing, or an entry is there twice, is no number, negative or not finite; the
                message has the line.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no latency table at {str(path)!r}")
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), skipinitialspace=True)
        columns = reader.fieldnames or []
        units = [unit for unit in _UNITS if unit in columns]
        missing = [column for column in _COLUMNS if column not in columns]
        if missing or len(units) != 1:
            raise ValueError(
                f"{path}: the columns are {', '.join(columns) or 'none'}; needed are {', '.join(_COLUMNS)} and one of "
                f"{', '.join(_UNITS)}"
            )
        times, kernels = {}, {}
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            try:
                entry = _entry(row["layer"], _read_bits(row["weight_bits"]), _read_bits(row["act_bits"]))
                time = _read_time(units[0], row[units[0]])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {error}") from None
            if entry in times:
                raise ValueError(f"{where}: {_named(entry)} is there twice")
            times[entry] = time
            if row.get("kernel"):
                kernels[entry] = row["kernel"]
        if not times:
            raise ValueError(f"{path}: the table has no entry")
        return cls(times, kernels)

    def to_csv(self, path: str | os.PathLike) -> None:
        """Write the table in nanoseconds, so that `from_csv` reads the same."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*_COLUMNS, "nanoseconds", "kernel"])
        for entry, time in self.times.items():
            layer, weight_bits, act_bits = entry
            writer.writerow([layer, _shown(weight_bits), _shown(act_bits), time, self.kernels.get(entry, "")])
        write_atomic(path, text.getvalue())

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        choices: SearchSpace | SpaceChoices | torch.device | str | None = None,
        example_inputs: ExampleInputs | None = None,
        *,
        device: torch.device | str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "LatencyTable":
        """Measure every layer with what this device can really run; see `asga.search.measured_latency`.

        ``LatencyTable.measure(model, "cuda", example_inputs=images)`` suffices where the search will have the usual
        space.

        Args:
            model: A float model; it is run once on `device`, in a copy if it is elsewhere.
            choices: The search space, or what `SearchSpace.choices` made of it for this model; None: ``SearchSpace()``.
                In its place `device` may stand.
            example_inputs: What the latency is to be for, batch size and resolution included. None: the model's own
                ``example_input_array``, as Lightning's modules have it.
            device: Where to measure; None: where the model is.
            progress: Called after every measurement with how many are done, and how many there are.

        Returns:
            Times of all pairs of candidates of all layers, and of the excluded ones as they are.

        Raises:
            TypeError: `device` is given twice, or `choices` is something else.
            ValueError: `example_inputs` is not known, or a layer is never called.
        """
        if isinstance(choices, torch.device | str):
            if device is not None:
                raise TypeError(f"device is {device!r}, and choices is {choices!r}, a device, too; give one of them")
            choices, device = None, choices
        space = SearchSpace() if choices is None else choices
        if not isinstance(space, SearchSpace | SpaceChoices):
            raise TypeError(f"choices is {choices!r}; a SearchSpace or what its `choices` gives is needed, or a device")
        if example_inputs is None:
            example_inputs = getattr(model, "example_input_array", None)
        if example_inputs is None:
            raise ValueError(
                "example_inputs is needed: times depend on the shapes that layers meet. Give a batch of the size and "
                "resolution that the latency is to be for, or set model.example_input_array"
            )
        here = to_device(example_inputs, next(model.parameters()).device)
        choices = space.choices(model, here) if isinstance(space, SearchSpace) else space
        pairs = {name: _pairs(choices, name) for name in choices.names}
        measured = measure_layers(model, example_inputs, pairs, device=device, progress=progress)
        times = {entry: nanoseconds for entry, (nanoseconds, _) in measured.items()}
        return cls(times, {entry: kernel for entry, (_, kernel) in measured.items()})

    def check(self, choices: SpaceChoices) -> None:
        """Check that there is a time for all that a policy of a space may choose.

        Raises:
            ValueError: There is not; the message names what is missing.
        """
        missing = [
            (name, *pair) for name in choices.names for pair in _pairs(choices, name) if (name, *pair) not in self.times
        ]
        if missing:
            shown = "\n".join(f"  {_named(entry)}" for entry in missing[:_MOST_SHOWN])
            more = f"\n  and {len(missing) - _MOST_SHOWN} more" if len(missing) > _MOST_SHOWN else ""
            raise ValueError(f"the latency table lacks {len(missing)} entries of the search space:\n{shown}{more}")

    def add_to(self, profiles: Mapping[str, LayerProfile], choices: SpaceChoices) -> dict[str, LayerProfile]:
        """Profiles with the times of this table.

        Args:
            profiles: Of the layers of the space.
            choices: The space.

        Raises:
            ValueError: As `check`.
        """
        self.check(choices)
        by_layer: dict[str, list[tuple[Bits, Bits, int]]] = {name: [] for name in profiles}
        for (layer, weight_bits, act_bits), time in self.times.items():
            if layer in by_layer:
                by_layer[layer].append((weight_bits, act_bits, time))
        return {name: replace(profile, latency_ns=tuple(by_layer[name])) for name, profile in profiles.items()}


def _pairs(choices: SpaceChoices, name: str) -> list[tuple[Bits, Bits]]:
    """All that a layer may be: its pairs of candidates, or float where it is excluded."""
    layer = choices.layers.get(name, LayerChoices((None,), (None,)))
    return [(weight_bits, act_bits) for weight_bits in layer.weight_bits for act_bits in layer.act_bits]


def _entry(layer: str, weight_bits: Bits, act_bits: Bits) -> Entry:
    """With bits in their canonical form: ``"int4"`` is 4."""
    bits = LayerPolicy(weight_bits, act_bits)
    return layer, bits.weight_bits, bits.act_bits


def _read_bits(text: str | None) -> Bits:
    if not text:
        raise ValueError("bits are missing; a number or float is needed")
    return None if text == "float" else int(text) if text.isdecimal() else text


def _read_time(unit: str, text: str | None) -> int:
    text = text or ""
    try:
        # Through float where there is an exponent: a fraction has all the digits of 1e999999999, one by one.
        time = Fraction(repr(float(text)) if "e" in text.lower() else text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{unit} is {text or None!r}; a finite number is needed") from None
    if time < 0:
        raise ValueError(f"{unit} is {text}; it must not be negative")
    return round(time * _UNITS[unit])


def _named(entry: Entry) -> str:
    layer, weight_bits, act_bits = entry
    return f"layer {layer!r} with {_shown(weight_bits)} weight bits and {_shown(act_bits)} activation bits"


def _shown(bits: Bits) -> str:
    return "float" if bits is None else str(bits)
