"""The table marks every case that a peer wins and says why, from the data."""

import pytest

from asga.bench.runner import Result, Timing
from asga.bench.table import losses, render

MB = 10**6


def _timing(name: str, seconds: float, speedup: float, *, spread: float = 0.0, **other) -> Timing:
    fields = {
        "is_peer": name not in ("asga", "copy"),
        "less_work": None,
        "rounds": 7,
        "seconds": (seconds, seconds, seconds),
        "speedup": (speedup - spread, speedup, speedup + spread),
        "page_faults": 0,
        "peak_forward_bytes": 4 * MB,
        "peak_backward_bytes": 8 * MB,
    }
    return Timing(name, **fields | other)


def _result(*timings: Timing, nbytes: int = 4 * MB, left_out: dict[str, str] | None = None) -> Result:
    named = {timing.name: timing for timing in timings}
    return Result(
        "core/act-1000000/k1/float32", nbytes, "steady", "forward+backward", 5 * nbytes, named, left_out or {}
    )


# 4 MB: 20 MB of traffic in 4 ms are 5 GB/s, a copy of 8 MB in 0.8 ms is 10 GB/s.
ASGA, COPY = _timing("asga", 4e-3, 1.0), _timing("copy", 0.8e-3, 0.2)
FAST, SLOW = _timing("fast", 2e-3, 0.5), _timing("slow", 8e-3, 2.0)


def test_bandwidths_and_best_peer():
    result = _result(ASGA, SLOW, FAST, COPY)
    assert result.bandwidth("asga") == pytest.approx(5e9)
    assert result.copy_bandwidth == pytest.approx(10e9)
    assert result.best_peer == FAST


def test_a_row():
    row = render([_result(ASGA, SLOW, COPY)]).splitlines()[-1]
    for cell in ("4.00 ms", "5.0", "50%", "slow 8.00 ms", "2.00 (2.00-2.00)", "1.00 + 2.00"):
        assert cell in row
    assert "<" not in row


def test_without_peers_there_is_no_ratio():
    assert _result(ASGA, COPY).best_peer is None
    assert " none" in render([_result(ASGA, COPY)])


def test_only_losses_are_listed():
    assert losses([_result(ASGA, SLOW, COPY)]) == []
    (line,) = losses([_result(ASGA, SLOW, FAST, COPY)])
    assert line.startswith("core/act-1000000/k1/float32 (steady, forward+backward): slower than fast (0.50x): ")
    text = render([_result(ASGA, SLOW, FAST, COPY)])
    assert "0.50 (0.50-0.50) <" in text
    assert text.endswith(f"Slower than a peer\n  {line}")


REASONS = {
    "spread": ((_timing("peer", 3.9e-3, 0.98, spread=0.1),), {}, "not beyond the spread of the rounds"),
    "less work": ((_timing("peer", 2e-3, 0.5, less_work="computes no gradient"),), {}, "which computes no gradient"),
    "new pages": (
        (_timing("asga", 4e-3, 1.0, page_faults=2000), _timing("peer", 2e-3, 0.5, page_faults=3)),
        {},
        "new pages take the time, 2000 page faults a call (the peer: 3)",
    ),
    "memory": ((_timing("peer", 3.5e-3, 0.9),), {}, "bound by memory; asga is at 50% of the copy bandwidth"),
    "arithmetic": ((_timing("peer", 3e-3, 0.7), _timing("copy", 0.4e-3, 0.1)), {}, "arithmetic; moving the bytes"),
    "calls": (
        (_timing("asga", 40e-6, 1.0), _timing("peer", 30e-6, 0.7), _timing("copy", 1e-6, 0.02)),
        {"nbytes": 10_000},
        "the fixed cost of calls; moving the bytes takes 6% of asga's 40.0 us",
    ),
}


@pytest.mark.parametrize(("timings", "other", "reason"), REASONS.values(), ids=REASONS)
def test_reasons(timings, other, reason):
    (line,) = losses([_result(ASGA, COPY, *timings, **other)])
    assert reason in line


def test_what_was_left_out_is_said_once():
    results = [_result(ASGA, COPY, left_out={"brevitas": "not installed"})] * 2
    assert render(results).endswith("Left out\n  brevitas: not installed (core/act-1000000/k1/float32)")
