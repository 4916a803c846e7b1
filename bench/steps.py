"""Steps of a sharpness-aware optimizer: the lists of parameters of real networks, and what is timed.

That is the part of the optimizer: gradients of both passes are given. Pass A is everything between the two
backward passes (norm, backup, perturbation), pass B everything after the second (projection, restore, the update of
the base optimizer), "step" both with all that a user's call costs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

PASSES = ("pass A", "pass B", "step")
# Variant of `asga.optim.ASGA` and base optimizer: the one that needs most of a step, the one that needs least, and the
# one with two moments.
METHODS = (("gsam", "sgd"), ("sam", "sgd"), ("sam", "adamw"))


@dataclass(frozen=True)
class StepCase:
    """The parameters of a network, and the step that they make.

    Attributes:
        network: Such as "resnet50".
        shapes: Of its parameters.
        dtype: Of all of them.
        variant: "gsam" or "sam".
        base: "sgd" with momentum, or "adamw"; both with weight decay.
    """

    network: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    variant: str = "gsam"
    base: str = "sgd"

    @property
    def name(self) -> str:
        """Such as ``step/resnet50/gsam-sgd/float32``."""
        return f"step/{self.network}/{self.variant}-{self.base}/{str(self.dtype).removeprefix('torch.')}"

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return self.dtype.itemsize * sum(torch.Size(shape).numel() for shape in self.shapes)

    def traffic(self, passes: str) -> int:
        """Bytes that must be moved.

        Pass A: 5 lists (g0 twice, weights in and out, backup). Pass B: backup, g1 and momentum in, weights and momentum
        out; a second moment in and out with AdamW; with GSAM both gradients for their products, and g0.
        """
        pass_b = {"sgd": 5, "adamw": 7}[self.base] + {"sam": 0, "gsam": 3}[self.variant]
        return {"pass A": 5, "pass B": pass_b, "step": 5 + pass_b}[passes] * self.nbytes


@dataclass(frozen=True)
class Stepper:
    """One implementation on the tensors of a case.

    Attributes:
        name: For tables.
        run: By passes what is timed; an implementation may lack the single passes.
        weights: What it moves.
        is_peer: False for asga itself.
    """

    name: str
    run: dict[str, Callable[[], None]]
    weights: list[Tensor]
    is_peer: bool = True


def select_steps(patterns: Sequence[str], device: str) -> list[StepCase]:
    """The cases whose name matches one of the patterns; the largest only on a GPU."""
    found = [case for case in _cases() if any(fnmatchcase(case.name, pattern) for pattern in patterns)]
    return [case for case in found if case.network != "gpt_1b3" or device.startswith("cuda")]


def _cases() -> Iterator[StepCase]:
    for network, shapes in (
        ("resnet18", _resnet(18)),
        ("resnet50", _resnet(50)),
        ("vit_b", _transformer(768, 12, [(768, 3, 16, 16), (768,), (1, 1, 768), (1, 197, 768), (1000, 768), (1000,)])),
        ("gpt_1b3", _transformer(2048, 24, [(50257, 2048), (2048, 2048)])),
    ):
        for variant, base in METHODS:
            yield StepCase(network, tuple(shapes), variant=variant, base=base)


def _resnet(depth: int) -> list[tuple[int, ...]]:
    """He et al., "Deep Residual Learning", CVPR 2016, table 1: convolutions, each with its BatchNorm, and the head."""
    shapes: list[tuple[int, ...]] = []

    def conv(out: int, inputs: int, side: int) -> None:
        shapes.extend([(out, inputs, side, side), (out,), (out,)])

    conv(64, 3, 7)
    inputs = 64
    for width, blocks in zip((64, 128, 256, 512), (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            out = width if depth == 18 else 4 * width
            if depth == 18:
                conv(width, inputs, 3)
                conv(width, width, 3)
            else:
                conv(width, inputs, 1)
                conv(width, width, 3)
                conv(out, width, 1)
            if block == 0 and inputs != out:
                conv(out, inputs, 1)
            inputs = out
    return [*shapes, (1000, inputs), (1000,)]


def _transformer(width: int, layers: int, rest: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Attention and a hidden layer of four times the width, each with biases and a LayerNorm."""
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    hidden = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*rest, *(layers * [*attention, *hidden, *4 * [(width,)]]), (width,), (width,)]
