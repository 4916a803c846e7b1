"""Runs cases: every implementation in interleaved rounds, under each condition of memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from asga.bench.inputs import Inputs, make_inputs
from asga.bench.machine import available_memory, machine_facts
from asga.bench.measure import (
    Sampler,
    device_time,
    interleaved,
    is_glibc,
    keep_freed_memory,
    page_faults,
    peak_memory,
    quartiles,
    return_freed_memory,
    wall_time,
)
from asga.bench.peers import Contestant, build_all
from asga.bench.searches import SearchCase, build_searches, select_searches
from asga.bench.shapes import PASSES, Case, select
from asga.bench.step_peers import build_steppers
from asga.bench.steps import PASSES as STEP_PASSES
from asga.bench.steps import StepCase, select_steps

# glibc never keeps a block larger than this (DEFAULT_MMAP_THRESHOLD_MAX in its malloc.c, on 64 bits).
_ALWAYS_FRESH = 32 * 2**20
# Up to this size, a call on a GPU may be shorter than what the host needs for it.
_LAYER_SIZED = 16 * 2**20

_QUICK_CASES = (
    *("core/act-*/float32", "core/weight-64x64x3x3/*/float32", "core/weight-144x1x3x3/k1/float32"),
    "options/weight-1024x1024-g128/k1/float32",
)


@dataclass(frozen=True)
class Config:
    """What to run, and for how long.

    Attributes:
        only: Patterns for the names of cases; see `select` of `asga.bench.shapes`, `select_steps` of `asga.bench.steps`
            and `select_searches` of `asga.bench.searches`.
        device: "cpu" or "cuda".
        batch_size: Of activations.
        rounds: Samples of each implementation, at most.
        sample_seconds: Length of a sample on the host's clock; at least one call.
        case_seconds: No further round begins after this time on one case.
        passes: What is timed, of "forward" and "forward+backward".
        compiled: Whether torch.compile takes part.

    Raises:
        ValueError: A number is not positive, `passes` has an unknown entry, or there is no such device.
    """

    only: tuple[str, ...] = ("core/*",)
    device: str = "cpu"
    batch_size: int = 64
    rounds: int = 31
    sample_seconds: float = 0.02
    case_seconds: float = 60.0
    passes: tuple[str, ...] = PASSES
    compiled: bool = True

    @classmethod
    def quick(cls, device: str = "cpu") -> "Config":
        """Six cases, enough to see where things stand: less than three minutes on two cores."""
        return cls(_QUICK_CASES, device, rounds=7, sample_seconds=0.005, case_seconds=8.0, passes=PASSES[1:])

    def __post_init__(self) -> None:
        for name in ("batch_size", "rounds", "sample_seconds", "case_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        kind = self.device.partition(":")[0]
        if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"device is {self.device!r}; it must be 'cpu', or 'cuda' where torch finds a GPU")
        if not self.passes or not set(self.passes) <= set(PASSES):
            raise ValueError(f"passes is {self.passes}; it takes entries of {PASSES}")


@dataclass(frozen=True)
class Timing:
    """One implementation on one case. Times are first quartile, median and third quartile over the rounds.

    Attributes:
        name: Of the implementation.
        is_peer: False for asga, and for the copy, the empty kernel and the step with fixed bits, which are what it is
            measured by.
        less_work: What it leaves out compared with asga, or None.
        rounds: Samples taken; only three of what is out of the race, see `measure.interleaved`.
        seconds: Of one call.
        speedup: Its time over that of asga in the same round: above one, asga is faster.
        page_faults: Of one call; None on a GPU.
        peak_forward_bytes: Extra memory at the worst moment of forward; includes the output. None for the copy.
        peak_backward_bytes: The same of backward; includes the gradients.
        peak_step_bytes: The same of a whole step of a search; None otherwise.
    """

    name: str
    is_peer: bool
    less_work: str | None
    rounds: int
    seconds: tuple[float, float, float]
    speedup: tuple[float, float, float]
    page_faults: int | None
    peak_forward_bytes: int | None
    peak_backward_bytes: int | None
    peak_step_bytes: int | None = None


@dataclass(frozen=True)
class Result:
    """All implementations on one case.

    Attributes:
        case: Name of the case.
        nbytes: Of its tensor, of all parameters of a step, of all tensors that one pass of a search quantizes.
        condition: "fresh" (outputs are on new pages, as glibc does with large blocks), "steady" (memory is
            already mapped), "system" (an allocator that is not glibc's, as it is); on a GPU "device" (its own clock,
            cold cache) or "calls" (host's clock, one call after the other).
        passes: "forward" or "forward+backward"; of a step one of `asga.bench.steps.PASSES`.
        traffic: Bytes that must be moved; see `Case.traffic` and `StepCase.traffic`. None for a search, which computes.
        timings: By name: "asga", its backends, the peers, "copy", on a GPU "empty kernel".
        left_out: Peers that did not run, with the reason.
    """

    case: str
    nbytes: int
    condition: str
    passes: str
    traffic: int | None
    timings: dict[str, Timing]
    left_out: dict[str, str]

    @property
    def copy_bandwidth(self) -> float:
        """Bytes per second that ``Tensor.copy_`` moves for a tensor of this size, read and written."""
        return 2 * self.nbytes / self.timings["copy"].seconds[1]

    def bandwidth(self, name: str) -> float | None:
        """Bytes per second of an implementation, counting only what must be moved; None without `traffic`."""
        return None if self.traffic is None else self.traffic / self.timings[name].seconds[1]

    @property
    def best_peer(self) -> Timing | None:
        """The fastest peer by its median, or None where none ran."""
        peers = [timing for timing in self.timings.values() if timing.is_peer]
        return min(peers, key=lambda timing: timing.seconds[1], default=None)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values, derived ones included."""
        best = self.best_peer
        derived = {
            "copy_bandwidth": self.copy_bandwidth,
            "bandwidth": {name: self.bandwidth(name) for name in self.timings if name not in _YARDSTICKS},
            "best_peer": best and best.name,
            "ratio_to_best_peer": best and best.speedup,
        }
        return {**asdict(self), **derived}


AnyCase = Case | StepCase | SearchCase
_YARDSTICKS = ("copy", "empty kernel")


def plan(config: Config) -> list[tuple[AnyCase, str]]:
    """The cases of a run, each with a condition, in order."""
    steps = [*select_steps(config.only, config.device), *select_searches(config.only, config.device)]
    if not steps:
        return _plan_quantizers(config)
    on_cpu = "steady" if is_glibc() else "system"
    condition = "calls" if torch.device(config.device).type == "cuda" else on_cpu
    planned = [(case, condition) for case in steps]
    only_steps = all(pattern.startswith(("step/", "search/")) for pattern in config.only)
    return planned if only_steps else _plan_quantizers(config) + planned


def _plan_quantizers(config: Config) -> list[tuple[Case, str]]:
    cases = select(config.only, config.batch_size)
    if torch.device(config.device).type == "cuda":
        small = [(case, "calls") for case in cases if case.nbytes <= _LAYER_SIZED]
        return [(case, "device") for case in cases] + small
    if not is_glibc():
        return [(case, "system") for case in cases]
    # Fresh first: pages that were kept once may be used again later. Smaller blocks are kept by glibc on its own. Some
    # implementations have float32 intermediates, whatever the dtype of the input.
    large = [(case, "fresh") for case in cases if 4 * case.numel > _ALWAYS_FRESH]
    return large + [(case, "steady") for case in cases]


def run(config: Config, progress: Callable[[str], None] = lambda line: None) -> Iterator[Result]:
    """Measure, giving each result as soon as it is there.

    On a CPU this changes how the process allocates memory for good (see `measure.keep_freed_memory`): better run it in
    a process of its own.

    Args:
        config: What to run.
        progress: Called with a line of text before each case, and for each case that does not fit into memory.

    Raises:
        ValueError: No case matches.
        UnequalResultsError: asga disagrees with its reference.
    """
    steps = plan(config)
    for number, (case, condition) in enumerate(steps, 1):
        needed, available = _memory_needed(case), _memory_available(config.device)
        if available is not None and needed > available:
            progress(f"[{number}/{len(steps)}] {case.name}: left out, needs {needed:.2g} bytes of {available:.2g}")
            continue
        progress(f"[{number}/{len(steps)}] {case.name} ({condition})")
        if condition == "fresh":
            return_freed_memory()
        elif condition == "steady":
            keep_freed_memory()
        yield from (_run_case if isinstance(case, Case) else _run_steps)(case, condition, config)


def report(config: Config, results: Sequence[Result]) -> dict[str, object]:
    """Everything about a run as plain JSON values, bandwidths in bytes per second."""
    return {
        "format": "asga.bench",
        "version": 1,
        "config": asdict(config),
        "machine": machine_facts(),
        "results": [result.to_dict() for result in results],
    }


def _run_case(case: Case, condition: str, config: Config) -> Iterator[Result]:
    inputs = make_inputs(case, config.device)
    found, left_out = build_all(inputs, compiled=config.compiled)
    peaks = {contestant.name: _peaks(contestant) for contestant in found}
    for passes in config.passes:
        runs = [_Run.of(contestant, passes) for contestant in found] + _yardsticks(inputs)
        timings = _time(runs, condition, config)
        for name, (forward_bytes, backward_bytes) in peaks.items():
            timings[name] = replace(timings[name], peak_forward_bytes=forward_bytes, peak_backward_bytes=backward_bytes)
        yield Result(case.name, case.nbytes, condition, passes, case.traffic(passes), timings, left_out)


def _run_steps(case: StepCase | SearchCase, condition: str, config: Config) -> Iterator[Result]:
    """Steps of an optimizer, or of a search."""
    device = torch.device(config.device)
    search = isinstance(case, SearchCase)
    found, left_out = (build_searches if search else build_steppers)(case, config.device, compiled=config.compiled)
    source = torch.ones(case.nbytes // case.dtype.itemsize, dtype=case.dtype, device=device)
    copy = _Run("copy", partial(torch.empty_like(source).copy_, source))
    for passes in ("step",) if search else STEP_PASSES:
        runs = [_Run(s.name, s.run[passes], s.is_peer) for s in found if passes in s.run] + [copy]
        timings = _time(runs, condition, config)
        if search:
            for run in runs[:-1]:
                peak, _ = peak_memory(run.call, lambda output: None, device)
                timings[run.name] = replace(timings[run.name], peak_step_bytes=peak)
        traffic = None if search else case.traffic(passes)
        yield Result(case.name, case.nbytes, condition, passes, traffic, timings, left_out)


def _time(runs: "Sequence[_Run]", condition: str, config: Config) -> dict[str, Timing]:
    """Interleaved rounds of all, without their memory."""
    device = torch.device(config.device)
    samplers = {run.name: run.sampler(condition, config.sample_seconds, device) for run in runs}
    samples = interleaved(samplers, config.rounds, config.case_seconds, baseline="asga")
    timings = {}
    for run in runs:
        ratios = [own / ours for own, ours in zip(samples[run.name], samples["asga"], strict=False)]
        timings[run.name] = Timing(
            name=run.name,
            is_peer=run.is_peer,
            less_work=run.less_work,
            rounds=len(samples[run.name]),
            seconds=quartiles(samples[run.name]),
            speedup=quartiles(ratios),
            page_faults=None if device.type == "cuda" else page_faults(run.call),
            peak_forward_bytes=None,
            peak_backward_bytes=None,
        )
    return timings


@dataclass(frozen=True)
class _Run:
    """What is timed under one name."""

    name: str
    call: Callable[[], object]
    is_peer: bool = False
    less_work: str | None = None
    context: Callable[[], AbstractContextManager] = nullcontext

    @classmethod
    def of(cls, contestant: Contestant, passes: str) -> "_Run":
        call = contestant.forward if passes == "forward" else contestant.forward_backward
        return cls(contestant.name, call, contestant.is_peer, contestant.less_work, contestant.context)

    def sampler(self, condition: str, seconds: float, device: torch.device) -> Sampler:
        with self.context():
            on_device = condition == "device"
            inner = device_time(self.call, device) if on_device else wall_time(self.call, seconds, device)

        def sample() -> float:
            with self.context():
                return inner()

        return sample


def _yardsticks(inputs: Inputs) -> list[_Run]:
    """What the memory can do: a copy into memory that is already mapped; on a GPU also what any call costs."""
    source = inputs.x.detach()
    found = [_Run("copy", partial(torch.empty_like(source).copy_, source))]
    if source.is_cuda:
        found.append(_Run("empty kernel", partial(torch.cuda._sleep, 0)))
    return found


def _peaks(contestant: Contestant) -> tuple[int, int]:
    """Peak extra memory of forward, and of backward."""
    with contestant.context():
        return peak_memory(contestant.forward, contestant.backward, contestant.grad.device)


def _memory_needed(case: AnyCase) -> int:
    """Bytes of the hungriest peer, about: eager LSQ keeps four float32 tensors per candidate for backward.

    Of steps, every implementation has six lists of tensors, and makes some more on the way.
    """
    if isinstance(case, StepCase):
        return 40 * case.nbytes
    return (4 * len(case.bits) + 8) * 4 * case.numel


def _memory_available(device: str) -> int | None:
    if torch.device(device).type == "cuda":
        # What torch's allocator keeps of earlier cases can be used again.
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return available_memory()
