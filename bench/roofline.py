"""A figure of bandwidth against the size of the tensor, with that of a plain copy as the roof."""

import io
import os
from collections.abc import Sequence

from asga._files import write_atomic
from asga.bench.runner import Result
from asga.report.style import FIRST, INK, SECOND, new_figure, style


def write_png(path: str | os.PathLike, results: Sequence[Result]) -> None:
    """Draw one panel per operator, condition and passes.

    Args:
        path: Of the PNG file.
        results: At least one with a `traffic`; others are left out.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no such result.
    """
    results = [result for result in results if result.traffic is not None]
    if not results:
        raise ValueError("there are no results to draw")
    panels: dict[str, list[Result]] = {}
    for result in results:
        _, _, candidates, dtype = result.case.split("/")
        operator = "fake_quant" if candidates == "k1" else f"mixed_fake_quant, K = {candidates[1:]}"
        if result.case.startswith("step/"):
            operator = candidates
        panels.setdefault(f"{operator}, {dtype}\n{result.passes}, {result.condition}", []).append(result)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    with style():
        figure = new_figure(1.0 + 3.2 * columns, 0.6 + 2.6 * rows)
        for index, (title, members) in enumerate(panels.items(), 1):
            _draw(figure.add_subplot(rows, columns, index), title, sorted(members, key=lambda result: result.nbytes))
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160)
    write_atomic(path, buffer.getvalue())


def _draw(axes, title: str, results: Sequence[Result]) -> None:
    """One panel. The bandwidths of asga and of the peers count only bytes that must be moved."""
    megabytes = [result.nbytes / 1e6 for result in results]
    axes.plot(megabytes, [r.copy_bandwidth / 1e9 for r in results], ".--", color=INK, label="copy")
    axes.plot(megabytes, [r.bandwidth("asga") / 1e9 for r in results], "o", color=FIRST, label="asga")
    raced = [result for result in results if result.best_peer is not None]
    peers = [result.bandwidth(result.best_peer.name) / 1e9 for result in raced]
    axes.plot([r.nbytes / 1e6 for r in raced], peers, "x", color=SECOND, label="best peer of each case")
    axes.set(title=title, xlabel="tensor (MB)", ylabel="GB/s", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")  # the default writes powers as formulas
        axis.set_minor_formatter("")
