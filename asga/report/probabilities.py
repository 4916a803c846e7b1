"""The probabilities of every candidate over the epochs of a search, and small drawings of them."""

from dataclasses import dataclass

import numpy as np

from asga.policy import WeightBits
from asga.report.run import TENSORS, Layers, Run
from asga.report.style import SHADES, Drawing

# A drawing is as wide as a word: more points would not be seen, and there are two drawings a layer.
_MOST_POINTS = 30


@dataclass(frozen=True)
class Series:
    """What one tensor went through.

    Args:
        candidates: Its bit-widths or formats.
        epochs: When probabilities were logged.
        probabilities: ``[epochs, candidates]``.
    """

    candidates: tuple[WeightBits, ...]
    epochs: tuple[int, ...]
    probabilities: np.ndarray


def read_series(run: Run) -> dict[str, dict[str, Series]]:
    """By layer and tensor (``"weight"``, ``"act"``) the probabilities of a run.

    Of the seeds of a search, their geometric mean, since that is what its policy is solved from. Other commands have
    a policy for each seed and show the last: the probabilities are those of the last seed, too.
    """
    seeds = list(run.probabilities.values())
    if run.command != "search":
        seeds = seeds[-1:]
    layers: dict[str, None] = {name: None for epochs in seeds for found in epochs.values() for name in found}
    return {name: {kind: _series(seeds, name, kind) for kind in TENSORS} for name in layers}


def sparkline(series: Series, name: str) -> Drawing:
    """Areas over each other, the fewest bits at the bottom and palest, from the first epoch to the last.

    Colors are the CSS classes ``shade0`` to ``shade7``.

    Args:
        series: At least one epoch.
        name: What it is about, such as ``"conv1, weight"``.
    """
    count, candidates = len(series.epochs), len(series.candidates)
    points = np.unique(np.linspace(0, count - 1, min(count, _MOST_POINTS)).round().astype(int))
    tops = 100 - (100 * series.probabilities[points].cumsum(1)).round().astype(int)
    if count == 1:  # a single epoch is shown as a bar
        tops = np.repeat(tops, 2, axis=0)
    width = len(tops) - 1
    classes = shades(candidates)
    areas = [f'<path class="shade{classes[-1]}" d="M0,0H{width}V100H0Z"/>']
    for k in reversed(range(candidates - 1)):
        line = "L".join(f"{x},{y}" for x, y in enumerate(tops[:, k]))
        areas.append(f'<path class="shade{classes[k]}" d="M{line}V100H0Z"/>')
    svg = f'<svg viewBox="0 0 {width} 100" preserveAspectRatio="none">{"".join(areas)}</svg>'
    steps = ", ".join(
        f"{described(bits)} {first:.0%} to {last:.0%}"
        for bits, first, last in zip(series.candidates, series.probabilities[0], series.probabilities[-1], strict=True)
    )
    return Drawing(svg, f"{name}: {steps}")


def described(bits: WeightBits) -> str:
    """``"4 bits"``, or the name of a small float."""
    return bits if isinstance(bits, str) else f"{bits} bits"


def shades(candidates: int) -> list[int]:
    """Which of the shades, 0 to 7, each candidate has: as far apart as they can be."""
    return [round(k * (SHADES - 1) / max(1, candidates - 1)) for k in range(candidates)]


def _series(seeds: list[dict[int, Layers]], name: str, kind: str) -> Series:
    logged: dict[int, list[list[float]]] = {}
    candidates: tuple[WeightBits, ...] = ()
    for epochs in seeds:
        for epoch, layers in epochs.items():
            if name in layers:
                logged.setdefault(epoch, []).append(layers[name][f"{kind}_probs"])
                candidates = tuple(layers[name][f"{kind}_bits"])
    epochs = sorted(logged)
    return Series(candidates, tuple(epochs), np.array([_geometric_mean(logged[epoch]) for epoch in epochs]))


def _geometric_mean(probabilities: list[list[float]]) -> np.ndarray:
    """Of several seeds, adding up to one; of a single one, its own."""
    if len(probabilities) == 1:
        return np.array(probabilities[0])
    with np.errstate(divide="ignore"):  # what underflowed to zero stays zero
        product = np.exp(np.log(np.array(probabilities)).mean(0))
    return product / product.sum()
