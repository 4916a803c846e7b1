"""The instruments: what they measure is known here in advance."""

import itertools

import pytest
import torch

from asga.bench.measure import interleaved, is_glibc, peak_memory, quartiles, wall_time

CPU = torch.device("cpu")


class TestInterleaved:
    def test_takes_turns(self):
        turns = []
        samplers = {name: lambda name=name: turns.append(name) or 1.0 for name in "abc"}
        samples = interleaved(samplers, rounds=4, seconds=60, baseline="b")
        assert "".join(turns) == "abcabcabcabc"
        assert samples == {name: [1.0] * 4 for name in "abc"}

    def test_stops_when_time_is_up_but_not_before_three_rounds(self):
        count = itertools.count()
        samples = interleaved({"a": lambda: float(next(count))}, rounds=100, seconds=0, baseline="a")
        assert samples == {"a": [0.0, 1.0, 2.0]}

    def test_what_is_five_times_slower_gets_three_rounds(self):
        seconds = {"asga": 1.0, "close": 5.0, "far": 5.1, "copy": 0.1}
        samplers = {name: lambda value=value: value for name, value in seconds.items()}
        samples = interleaved(samplers, rounds=9, seconds=60, baseline="asga")
        assert {name: len(taken) for name, taken in samples.items()} == {"asga": 9, "close": 9, "far": 3, "copy": 9}


def test_quartiles():
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_wall_time_repeats_short_calls_to_fill_the_sample():
    calls = []
    sampler = wall_time(lambda: calls.append(None), seconds=1e-3, device=CPU)
    calls.clear()
    assert 0 < sampler() < 1e-3
    assert len(calls) > 10


class TestPeakMemory:
    def test_forward_counts_what_was_there_at_once(self):
        x = torch.zeros(1024)

        def forward() -> torch.Tensor:
            kept = x.clone()
            temporary = torch.cat([kept, kept])  # 4 + 8 KiB
            del temporary
            return kept

        assert peak_memory(forward, lambda output: None, CPU) == (12 * 1024, 0)

    def test_backward_is_counted_from_the_end_of_forward(self):
        x = torch.zeros(1024, requires_grad=True)
        grad = torch.ones(1024)

        def backward(output: torch.Tensor) -> object:
            return torch.autograd.grad(output, x, grad)

        # Of a square root, the output is kept; backward has twice the output as a temporary beside the gradient.
        assert peak_memory(lambda: torch.sqrt(x), backward, CPU) == (4096, 2 * 4096)

    def test_what_backward_frees_makes_room(self):
        x = torch.zeros(1024)

        def backward(kept: list[torch.Tensor]) -> torch.Tensor:
            kept.clear()
            return x.clone()

        assert peak_memory(lambda: [x.clone(), x.clone()], backward, CPU) == (2 * 4096, 0)


@pytest.mark.skipif(not is_glibc(), reason="another allocator than glibc's")
def test_pages_are_new_or_kept(run_python):
    code = """
import torch
from asga.bench.measure import keep_freed_memory, page_faults, return_freed_memory
call = lambda: torch.zeros(2**20)  # 4 MiB: 1,024 pages of 4 KiB
return_freed_memory()
print(min(page_faults(call) for _ in range(5)) >= 1000)
keep_freed_memory()
print(min(page_faults(call) for _ in range(5)) < 100)
"""
    # Huge pages, where the system gives them unasked, would be 512 times fewer.
    assert run_python(code, GLIBC_TUNABLES="glibc.malloc.hugetlb=0") == "True\nTrue"
