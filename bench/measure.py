"""How things are measured: time in interleaved rounds, page faults, peak memory, and what freed memory does."""

import ctypes
import gc
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
# A sampler runs something once or several times and returns the seconds of one call.
Sampler = Callable[[], float]

_FEW_ROUNDS, _OUT_OF_THE_RACE = 3, 5.0

# The parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4

_BACKWARD_MARK = "asga.bench: backward"


def interleaved(samplers: Mapping[str, Sampler], rounds: int, seconds: float, baseline: str) -> dict[str, list[float]]:
    """Take one sample of each in turn, so that whatever slows the machine for a while slows them all.

    Args:
        samplers: By name.
        rounds: How many rounds at most.
        seconds: No further round begins after this time; the first three are taken in any case.
        baseline: Name of what the others are compared with. What takes more than five times as long is out of the race
            after three rounds, which leaves the time to those that come close.

    Returns:
        Samples by name; those at the same place were taken in the same round.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    racing = dict(samplers)
    started = time.perf_counter()
    with _no_garbage_collection():
        for done in range(rounds):
            if done == _FEW_ROUNDS:
                limit = _OUT_OF_THE_RACE * statistics.median(samples[baseline])
                racing = {name: racing[name] for name in racing if statistics.median(samples[name]) <= limit}
            if done >= _FEW_ROUNDS and time.perf_counter() - started > seconds:
                break
            for name, sampler in racing.items():
                samples[name].append(sampler())
    return samples


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, which are among or between the values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


def wall_time(call: Callable[[], object], seconds: float, device: torch.device) -> Sampler:
    """Time of a call on the host's clock, calls following each other; on a GPU until its queue has run dry.

    Each sample begins with a call that does not count. It finds the caches as the others left them, and the memory of
    a virtual machine as the host left it: what has been free for a second or two may have gone back to the host, and
    is ten times slower to touch than memory that has been in use just before.

    Args:
        call: Warmed up here.
        seconds: Length of a sample; it holds at least one call.
        device: Where the work is done.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def sample(calls: int) -> float:
        call()
        synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        return (time.perf_counter() - started) / calls

    once = sample(1)
    if once < seconds:
        once = min(sample(1) for _ in range(3))
    calls = max(1, round(seconds / once))
    return lambda: sample(calls)


def device_time(call: Callable[[], object], device: torch.device) -> Sampler:
    """Time of a call on the clock of a GPU, from a cold cache.

    The L2 cache is overwritten before. The queue is held up meanwhile, so that the host is ahead of the GPU and its
    time does not count, except where the call itself waits for the GPU.
    """
    flushed = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        flushed.zero_()
        torch.cuda._sleep(4_000_000)  # cycles: about 2 ms, more than the host needs for any of the calls
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    for _ in range(3):
        sample()
    return sample


def return_freed_memory() -> None:
    """From now on, blocks of 128 KiB or more are taken from the operating system and given back when they are freed.

    So every large output is written to new pages, at the price of a page fault each. It is where glibc starts, and
    always so for blocks of more than 32 MiB; for smaller ones it adapts to what was freed before, which is switched
    off here: results shall not depend on what ran earlier.
    """
    libc = _glibc()
    for parameter, value in ((_M_MMAP_THRESHOLD, 2**17), (_M_TRIM_THRESHOLD, 2**17), (_M_MMAP_MAX, 2**16)):
        if not libc.mallopt(parameter, value):
            raise OSError(f"mallopt({parameter}, {value}) failed")
    libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """From now on, memory that is freed stays with the process and is used again, as it is for a caching allocator."""
    libc = _glibc()
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
        if not libc.mallopt(parameter, value):
            raise OSError(f"mallopt({parameter}, {value}) failed")


def is_glibc() -> bool:
    """Whether the allocator is glibc's, which the two functions above steer."""
    return platform.libc_ver()[0] == "glibc"


def page_faults(call: Callable[[], object]) -> int:
    """Pages that the operating system had to provide during one call, in all threads."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def peak_memory(forward: Callable[[], T], backward: Callable[[T], object], device: torch.device) -> tuple[int, int]:
    """Bytes that tensors occupied at the worst moment, beyond what was there before: of forward, and of backward.

    On a CPU every allocation is recorded by torch's profiler, exact to the byte; working memory that a kernel takes
    without torch's allocator is not seen. On a GPU it is what torch's allocator counts, in blocks of 512 bytes.

    Args:
        forward: Returns the output. What it keeps for backward counts for it.
        backward: Takes the output. Its peak is counted from where forward ended.
        device: Where the work is done.
    """
    return _peak_on_gpu(forward, backward, device) if device.type == "cuda" else _peak_on_cpu(forward, backward)


def _peak_on_gpu(forward: Callable[[], T], backward: Callable[[T], object], device: torch.device) -> tuple[int, int]:
    def start() -> int:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)

    before_forward = start()
    output = forward()
    forward_peak = torch.cuda.max_memory_allocated(device)
    before_backward = start()
    backward(output)
    return forward_peak - before_forward, torch.cuda.max_memory_allocated(device) - before_backward


def _peak_on_cpu(forward: Callable[[], T], backward: Callable[[T], object]) -> tuple[int, int]:
    # The profiler announces every start and stop on stderr unless told otherwise before its first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = forward()
        with torch.profiler.record_function(_BACKWARD_MARK):
            gradients = backward(output)
    del output, gradients
    # The public API adds allocations up by operator; their order is only in the raw events.
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    level, base, peaks = 0, 0, [0]
    for event in events:
        if event.name() == _BACKWARD_MARK:
            base = level
            peaks.append(0)
        elif event.name() == "[memory]":
            level += event.nbytes()
            peaks[-1] = max(peaks[-1], level - base)
    forward_peak, backward_peak = peaks
    return forward_peak, backward_peak


def _glibc() -> ctypes.CDLL:
    return ctypes.CDLL("libc.so.6")


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
