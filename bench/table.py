"""Results as text: one line per case, and for every case that a peer wins, a line that says by how much and why."""

from collections.abc import Sequence

from asga.bench.runner import Result, Timing
from asga.bench.searches import FIXED_BITS

# Below this share of the copy bandwidth at least half of the time goes into something else than moving bytes.
_MOSTLY_NOT_MEMORY = 0.5
# Bytes up to which this something else is taken to be the fixed cost of calls. A microsecond moves about 20 KB.
_SMALL = 2**20
_PAGE = 4096


def render(results: Sequence[Result]) -> str:
    """The table, and below it the losses and what was left out."""
    rows = [_HEAD, *(row for result in results for row in _rows(result))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2].ljust(widths[2])]
        cells += [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    for title, notes in (("Slower than a peer", losses(results)), ("Left out", _left_out(results))):
        if notes:
            lines += ["", title, *(f"  {note}" for note in notes)]
    return "\n".join(lines)


def losses(results: Sequence[Result]) -> list[str]:
    """A line for every peer that was faster than asga, with the most likely reason that the data show."""
    return [
        f"{result.case} ({result.condition}, {result.passes}): slower than {peer.name} ({peer.speedup[1]:.2f}x): "
        f"{_reason(result, peer)}"
        for result in results
        for peer in result.timings.values()
        if peer.is_peer and peer.speedup[1] < 1
    ]


_HEAD = (
    "case",
    "memory",
    "passes",
    "implementation",
    "time",
    "GB/s",
    "of copy",
    "best peer",
    "ratio (quartiles)",
    "extra memory / tensor",
)


def _rows(result: Result) -> list[tuple[str, ...]]:
    """One for asga, and on a GPU one for each of its backends."""
    best = result.best_peer
    rows = []
    for timing in result.timings.values():
        if not timing.name.startswith("asga"):
            continue
        bandwidth = result.bandwidth(timing.name)
        rates = (
            ("", "") if bandwidth is None else (f"{bandwidth / 1e9:.1f}", f"{bandwidth / result.copy_bandwidth:.0%}")
        )
        if best is None:
            versus, ratio = "none", ""
        elif timing.name == "asga":
            low, middle, high = best.speedup
            versus = f"{best.name} {_duration(best.seconds[1])}"
            ratio = f"{middle:.2f} ({low:.2f}-{high:.2f})" + (" <" if middle < 1 else "")
        else:
            versus, ratio = "", f"{best.seconds[1] / timing.seconds[1]:.2f}"
        rows.append(
            (
                result.case,
                result.condition,
                result.passes,
                timing.name,
                _duration(timing.seconds[1]),
                *rates,
                versus,
                ratio,
                _extra_memory(timing, result),
            )
        )
    return rows


def _extra_memory(timing: Timing, result: Result) -> str:
    """Forward and backward, in sizes of the tensor: 1.00 is the output, or the gradient of the input, alone.

    Of the step of a search in all, and beside it the share of what the step needs with fixed bits.
    """
    if timing.peak_step_bytes is not None:
        fixed = result.timings[FIXED_BITS].peak_step_bytes
        return f"{timing.peak_step_bytes / result.nbytes:.2f} ({timing.peak_step_bytes / fixed:.2f} of {FIXED_BITS})"
    if timing.peak_forward_bytes is None or timing.peak_backward_bytes is None:
        return ""
    return f"{timing.peak_forward_bytes / result.nbytes:.2f} + {timing.peak_backward_bytes / result.nbytes:.2f}"


def _reason(result: Result, peer: Timing) -> str:
    ours = result.timings["asga"]
    if peer.speedup[2] >= 1:
        return f"not beyond the spread of the rounds (quartiles {peer.speedup[0]:.2f} to {peer.speedup[2]:.2f})"
    if peer.less_work is not None:
        return f"which {peer.less_work}"
    if ours.page_faults is not None and ours.page_faults * _PAGE >= result.nbytes:
        theirs = "as many" if peer.page_faults == ours.page_faults else str(peer.page_faults)
        return f"new pages take the time, {ours.page_faults} page faults a call (the peer: {theirs})"
    if result.traffic is None:
        share = result.timings[FIXED_BITS].seconds[1] / ours.seconds[1]
        return f"what is not quantization, which the peer compiles too: {FIXED_BITS} take {share:.0%} of asga's time"
    share = result.bandwidth("asga") / result.copy_bandwidth
    if share >= _MOSTLY_NOT_MEMORY:
        return f"both are bound by memory; asga is at {share:.0%} of the copy bandwidth"
    if result.nbytes <= _SMALL:
        return f"the fixed cost of calls; moving the bytes takes {share:.0%} of asga's {_duration(ours.seconds[1])}"
    return f"arithmetic; moving the bytes takes {share:.0%} of asga's {_duration(ours.seconds[1])}"


def _left_out(results: Sequence[Result]) -> list[str]:
    """Each peer once per reason, with the first case and how many others there are."""
    where: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, reason in result.left_out.items():
            cases = where.setdefault((name, reason), [])
            if result.case not in cases:
                cases.append(result.case)
    return [
        f"{name}: {reason} ({cases[0]}{f' and {len(cases) - 1} more' if len(cases) > 1 else ''})"
        for (name, reason), cases in where.items()
    ]


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
