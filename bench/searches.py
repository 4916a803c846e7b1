"""Steps of a bit-width search on real networks, and who can make the same step.

What is timed is everything that a step does: forward and backward of the mixture, once or (ASGA) twice, the expected
cost, and the updates of weights, scales and logits. A step of the same network with one fixed bit-width a layer is the
yardstick: what the K candidates cost beyond it, in time and in memory.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial

import torch
from torch import Tensor, nn

from asga.bench.edmips import LOGIT_LR, LR, MOMENTUM, WEIGHT_DECAY, PlainSearch, plain_twin
from asga.bench.steps import Stepper
from asga.convert import find_quantizable, quantize
from asga.models import build_model
from asga.nn import calibrate, parameter_groups
from asga.nn.quantizers import Quantizer
from asga.optim import ASGA
from asga.optim.guarded import GuardedSGD
from asga.search import Budget, PolicySearcher, SearchSpace
from asga.search.costs import cost_tables
from asga.search.dual import DualAscent
from asga.search.trained import Search
from asga.steps import training_step

METHODS = ("asga", "sgd")
FIXED_BITS = "fixed bits"
_BUDGET = Budget(bitops="w3a3")
# Of a schedule so long that rates and targets stay where they are at its start.
_STEPS = 10**6
# In float32 asga keeps the factors of gradients of scales, probabilities and costs: 6e-8, and a few sums of them.
_TOLERANCE = 1e-5


class UnequalStepsError(Exception):
    """Asga makes another step than plain torch."""


@dataclass(frozen=True)
class SearchCase:
    """A network and a way to search.

    Attributes:
        network: Of `asga.models`.
        method: Of `asga.search.PolicySearcher`: "asga" makes two passes a step, "sgd" one.
        dtype: Of the layers' arithmetic: that of all parameters, or in two bytes what autocast casts to.
        batch: Images of a step.
        side: Of the images, in pixels.
        classes: Of the labels.
    """

    network: str
    method: str
    dtype: torch.dtype
    batch: int
    side: int
    classes: int

    @property
    def name(self) -> str:
        """Such as ``search/resnet20/asga/float32``."""
        return f"search/{self.network}/{self.method}/{str(self.dtype).removeprefix('torch.')}"

    @property
    def bits(self) -> tuple[int, ...]:
        """The candidates: the default ones."""
        return SearchSpace().weight_bits

    @property
    def numel(self) -> int:
        """Values of all tensors that one pass quantizes: weights, and the inputs of their layers."""
        return _quantized_values(self.network, self.batch, self.side, self.classes)

    @property
    def nbytes(self) -> int:
        """Bytes of these tensors."""
        return self.numel * self.dtype.itemsize

    @property
    def autocast(self) -> torch.dtype | None:
        """As `PolicySearcher` takes it."""
        return self.dtype if self.dtype.itemsize < 4 else None

    def model(self) -> nn.Module:
        """The float network, the same on every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build_model(self.network, self.classes)
        # As the command line has them.
        model.to(memory_format=torch.channels_last)
        return model.double() if self.dtype == torch.float64 else model

    def images(self, device: str) -> tuple[Tensor, Tensor]:
        """A batch, and its labels; random."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, self.side, self.side, generator=generator)
        images = images.double() if self.dtype == torch.float64 else images
        return images.to(device), torch.randint(self.classes, (self.batch,), generator=generator).to(device)


def select_searches(patterns: Sequence[str], device: str) -> list[SearchCase]:
    """The cases whose name matches one of the patterns; those of large images only on a GPU."""
    found = [case for case in _cases() if any(fnmatchcase(case.name, pattern) for pattern in patterns)]
    return [case for case in found if case.side < 224 or device.startswith("cuda")]


def _cases() -> Iterator[SearchCase]:
    for network, batch, side, classes in (("resnet20", 128, 32, 10), ("resnet18", 128, 224, 1000)):
        for method in METHODS:
            for dtype in (torch.float32, torch.bfloat16):
                yield SearchCase(network, method, dtype, batch, side, classes)


@cache
def _quantized_values(network: str, batch: int, side: int, classes: int) -> int:
    """Counted on tensors without memory."""
    with torch.device("meta"):
        model, images = build_model(network, classes), torch.empty(batch, 3, side, side)
    layers = find_quantizable(model)[0].values()
    inputs: list[int] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].numel()))
    model(images)
    return sum(inputs) + sum(layer.weight.numel() for layer in layers)


def build_searches(case: SearchCase, device: str, *, compiled: bool = True) -> tuple[list[Stepper], dict[str, str]]:
    """Everything that can make the step here, asga first, and why the others cannot.

    Args:
        case: What to search.
        device: Where.
        compiled: Whether torch.compile takes part.

    Raises:
        UnequalStepsError: Asga and eager PyTorch make different steps.
    """
    check_steps(case, device)
    search, batch = start(case, device), case.images(device)
    found = [_stepper("asga", search.model, partial(search.step, *batch), is_peer=False)]
    for name in ("eager", "torch.compile") if compiled else ("eager",):
        plain = plain_search(case, search, compiled=name == "torch.compile")
        found.append(_stepper(name, plain.model, partial(plain.step, *batch)))
    return [*found, fixed_bits(case, device)], {}


def start(case: SearchCase, device: str) -> Search:
    """The search before its first step."""
    searcher = PolicySearcher(
        case.model().to(device),
        budget=_BUDGET,
        epochs=1,
        method=case.method,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        warmup=0,
        logit_lr=LOGIT_LR,
        temperature=(1.0, 1.0),
        relaxation="softmax",  # as its peers
        calibration_batches=1,
        autocast=case.autocast,
    )
    return searcher.start(_Endless(case.images(device)))


def plain_search(case: SearchCase, search: Search, *, compiled: bool) -> PlainSearch:
    """The same in plain torch, from where the search is now."""
    choices = SearchSpace().choices(case.model())
    limit = _BUDGET.limits(search.profiles, choices)["bitops"]
    tables = cost_tables(search.profiles, choices)["bitops"]
    device = next(search.model.parameters()).device
    shares = {name: torch.tensor(table / limit, dtype=torch.float32, device=device) for name, table in tables.items()}
    return PlainSearch(
        plain_twin(search.model),
        shares,
        DualAscent(["bitops"], _STEPS),
        sharpness_aware=case.method == "asga",
        autocast=case.autocast,
        compiled=compiled,
    )


def check_steps(case: SearchCase, device: str) -> None:
    """Compare the first step of asga with that in plain torch: loss, gradients and moves of all parameters.

    In float64, on few images. In float32 a value next to a rounding boundary may go either way, and twenty quantized
    layers make of it gradients that differ by a third.

    Raises:
        UnequalStepsError: They differ by more than what asga keeps in float32: scales' factors and probabilities.
    """
    small = replace(case, batch=4, dtype=torch.float64)
    search, batch = start(small, device), small.images(device)
    with torch.no_grad():
        for quantizer in search.model.modules():
            if isinstance(quantizer, Quantizer):
                # Initial scales put the largest value exactly on the boundary of the range.
                scale = quantizer.scale_parameter
                scale.mul_(torch.linspace(0.98, 1.02, scale.numel(), device=device).reshape(scale.shape))
    plain = plain_search(small, search, compiled=False)
    before = {name: p.detach().clone() for name, p in search.model.named_parameters()}
    losses = search.step(*batch).metrics["loss"], plain.step(*batch)
    ours, theirs = dict(search.model.named_parameters()), dict(plain.model.named_parameters())
    pairs = {"losses": tuple(map(torch.tensor, losses))}
    for kind, suffixes in (("weights", (".weight", ".bias")), ("scales", (".scale", ".scales")), ("logits", ".logits")):
        names = [name for name in before if name.endswith(suffixes)]
        for what, value in (
            ("gradients", lambda p, name: p.grad),
            ("moves", lambda p, name: p.detach() - before[name]),
        ):
            pairs[f"{what} of {kind}"] = tuple(
                torch.cat([value(found[name], name).flatten() for name in names]) for found in (ours, theirs)
            )
    for what, (own, other) in pairs.items():
        difference = ((own - other).norm() / other.norm()).item()
        if not difference <= _TOLERANCE:
            raise UnequalStepsError(f"{case.name}: {what} differ by {difference:.2g} in the first step")


def fixed_bits(case: SearchCase, device: str) -> Stepper:
    """Training with the same optimizer, every layer at 4 bits but the first and the last at 8."""
    float_model = case.model().to(device)
    model = quantize(float_model, SearchSpace().choices(float_model).uniform(4, 4)).train()
    images, labels = case.images(device)
    calibrate(model, [images])
    options = {"lr": LR, "momentum": MOMENTUM, "nesterov": True, "model": model}
    groups = parameter_groups(model, weight_decay=WEIGHT_DECAY)
    optimizer = ASGA(groups, **options) if case.method == "asga" else GuardedSGD(groups, **options)
    step = partial(training_step, model, optimizer, images, labels, autocast=case.autocast)
    return _stepper(FIXED_BITS, model, step, is_peer=False)


def _stepper(name: str, model: nn.Module, step: Callable[[], object], *, is_peer: bool = True) -> Stepper:
    return Stepper(name, {"step": step}, list(model.parameters()), is_peer)


class _Endless:
    """One batch, again and again: a loader."""

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return _STEPS

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(self._batch, _STEPS)
