"""What is measured: tensors of real networks and sweeps over sizes, with the bytes that each must move."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

# One candidate runs fake_quant, several run mixed_fake_quant: the default candidates of asga.SearchSpace.
SINGLE_BITS, MIXED_BITS = (4,), (2, 3, 4, 6, 8)
DTYPES = (torch.float32, torch.bfloat16)
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One tensor to quantize.

    Attributes:
        suite: The network or group it belongs to.
        kind: "act" (one scale) or "weight" (one scale per channel, axis 0, or per group).
        shape: Of the tensor.
        bits: The candidates: one for `fake_quant`, several for `mixed_fake_quant`.
        dtype: Of the tensor; scales, zero points and probabilities are float32.
        group_size: Neighbors along the last dimension that share a scale, or None.
        offset: Whether there are learned zero points, one for each scale.
        channels_last: Whether the four dimensions of the tensor lie so in memory.
    """

    suite: str
    kind: str
    shape: tuple[int, ...]
    bits: tuple[int, ...]
    dtype: torch.dtype
    group_size: int | None = None
    offset: bool = False
    channels_last: bool = False

    @property
    def name(self) -> str:
        """Such as ``core/weight-64x64x3x3/k5/float32`` or ``options/weight-4096x4096-g128-offset/k1/bfloat16``."""
        tensor = f"{self.kind}-{'x'.join(map(str, self.shape))}"
        tensor += f"-g{self.group_size}" if self.group_size else ""
        tensor += "-offset" * self.offset + "-channels_last" * self.channels_last
        return f"{self.suite}/{tensor}/k{len(self.bits)}/{str(self.dtype).removeprefix('torch.')}"

    @property
    def axis(self) -> int | None:
        """Dimension of the channels, as the operators take it."""
        return 0 if self.kind == "weight" and self.group_size is None else None

    @property
    def rows(self) -> "Case":
        """The same with the groups as the channels of a matrix; itself without groups."""
        if self.group_size is None:
            return self
        return replace(self, shape=(self.numel // self.group_size, self.group_size), group_size=None)

    @property
    def numel(self) -> int:
        """Values of the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.numel * self.dtype.itemsize

    def traffic(self, passes: str) -> int:
        """Bytes that must cross the memory bus, whatever the implementation and the number of candidates.

        Forward reads x and writes y; backward reads g and x and writes dx. Both read the scales and zero points of
        groups, and backward writes their gradients; those of channels, and probabilities, are too small to count.
        Reading a line of the cache to overwrite it is not counted, here or for the copy.

        Args:
            passes: "forward" or "forward+backward".
        """
        parameters = 0 if self.group_size is None else self.numel // self.group_size * len(self.bits)
        of_parameters = parameters * (1 + self.offset) * torch.float32.itemsize
        tensors, parameter_passes = {"forward": (2, 1), "forward+backward": (5, 3)}[passes]
        return tensors * self.nbytes + parameter_passes * of_parameters


def select(patterns: Sequence[str], batch_size: int) -> list[Case]:
    """The cases whose name matches one of the patterns, each tensor once (under its first name).

    Args:
        patterns: As a shell would match file names: ``core/*``, ``*/weight-*/k5/bfloat16``.
        batch_size: Of the activations of convolutional networks and vision transformers.

    Raises:
        ValueError: No case matches.
    """
    found: dict[Case, Case] = {}
    for case in _all_cases(batch_size):
        if any(fnmatchcase(case.name, pattern) for pattern in patterns):
            found.setdefault(replace(case, suite=""), case)
    if not found:
        raise ValueError(
            f"no case matches {' '.join(patterns)!r}; names look like 'core/weight-64x64x3x3/k5/float32', "
            f"and the suites are {', '.join((*_suites(batch_size), 'options'))}"
        )
    return list(found.values())


def _all_cases(batch_size: int) -> Iterator[Case]:
    for suite, tensors in _suites(batch_size).items():
        for kind, shapes in tensors.items():
            for shape in shapes:
                for bits in (SINGLE_BITS, MIXED_BITS):
                    for dtype in DTYPES:
                        yield Case(suite, kind, shape, bits, dtype)
    for bits in (SINGLE_BITS, MIXED_BITS):
        for dtype in DTYPES:
            yield from _options(batch_size, bits, dtype)


def _options(batch_size: int, bits: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    """Groups, as of Llama-3-8B's query projection (and a quarter of its sides), learned offsets, channels_last."""
    activation, weight = ("act", (batch_size, 64, 56, 56)), ("weight", (512, 512, 3, 3))
    for side in (1024, 4096):
        for offset in (False, True):
            yield Case("options", "weight", (side, side), bits, dtype, group_size=128, offset=offset)
    for tensor in (activation, weight):
        yield Case("options", *tensor, bits, dtype, offset=True)
        yield Case("options", *tensor, bits, dtype, channels_last=True)


def _suites(batch_size: int) -> dict[str, dict[str, list[tuple[int, ...]]]]:
    """Shapes by suite and kind; of networks the weights, and the inputs of their convolutions and linear layers."""

    def batches(*shapes: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(batch_size, *shape) for shape in shapes]

    def images(*sizes: tuple[int, int]) -> list[tuple[int, ...]]:
        return batches(*((channels, side, side) for channels, side in sizes))

    depthwise = [(channels, 1, 3, 3) for channels in (32, 96, 144, 192, 384, 576, 960)]
    return {
        "core": {"act": images((64, 56)), "weight": [(512, 512, 3, 3), (64, 64, 3, 3), *depthwise]},
        "sweep": {
            # 4 KiB to 1 GiB in float32.
            "act": [(4**exponent,) for exponent in range(5, 15)],
            "weight": [(512, 4**exponent) for exponent in range(2, 10)],
        },
        # He et al., "Deep Residual Learning", CVPR 2016, table 1, for images of 224x224.
        "resnet18": {
            "weight": [
                (64, 3, 7, 7),
                (64, 64, 3, 3),
                *_basic_blocks(128, 64),
                *_basic_blocks(256, 128),
                *_basic_blocks(512, 256),
                (1000, 512),
            ],
            "act": [*images((3, 224), (64, 56), (128, 28), (256, 14), (512, 7)), *batches((512,))],
        },
        # The same table; the stride is in the 3x3 convolutions, as in torchvision's models.
        "resnet50": {
            "weight": [
                (64, 3, 7, 7),
                *_bottlenecks(64, 64),
                *_bottlenecks(128, 256),
                *_bottlenecks(256, 512),
                *_bottlenecks(512, 1024),
                (1000, 2048),
            ],
            "act": [
                *images((3, 224), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14)),
                *images((1024, 14), (512, 14), (512, 7), (2048, 7)),
                *batches((2048,)),
            ],
        },
        # Sandler et al., "MobileNetV2", CVPR 2018, table 2, for images of 224x224.
        "mobilenet_v2": {
            "weight": [
                (32, 3, 3, 3),
                *depthwise,
                *_pointwise((16, 32), (96, 16), (24, 96), (144, 24), (24, 144), (32, 144), (192, 32), (32, 192)),
                *_pointwise((64, 192), (384, 64), (64, 384), (96, 384), (576, 96), (96, 576), (160, 576)),
                *_pointwise((960, 160), (160, 960), (320, 960), (1280, 320)),
                (1000, 1280),
            ],
            "act": [
                *images((3, 224), (32, 112), (16, 112), (96, 112), (96, 56), (24, 56), (144, 56), (144, 28)),
                *images((32, 28), (192, 28), (192, 14), (64, 14), (384, 14), (96, 14), (576, 14), (576, 7)),
                *images((160, 7), (960, 7), (320, 7)),
                *batches((1280,)),
            ],
        },
        # Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, table 1: ViT-Base, patches of 16x16.
        "vit_b": {
            "weight": [(768, 3, 16, 16), (2304, 768), (768, 768), (3072, 768), (768, 3072), (1000, 768)],
            "act": [*images((3, 224)), *batches((197, 768), (197, 3072), (768,))],
        },
        # Grattafiori et al., "The Llama 3 Herd of Models", 2024, table 3; one sequence of 2,048 tokens.
        "llama3_8b": {
            "weight": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096)],
            "act": [(1, 2048, 4096), (1, 2048, 14336)],
        },
    }


def _basic_blocks(width: int, inputs: int) -> list[tuple[int, ...]]:
    """Weights of a stage of ResNet-18 with a projection on its shortcut."""
    return [(width, inputs, 3, 3), (width, width, 3, 3), (width, inputs, 1, 1)]


def _bottlenecks(width: int, inputs: int) -> list[tuple[int, ...]]:
    """Weights of a stage of ResNet-50: the first block, its projection, and the later blocks."""
    first = _pointwise((width, inputs), (4 * width, width), (4 * width, inputs), (width, 4 * width))
    return [*first, (width, width, 3, 3)]


def _pointwise(*sizes: tuple[int, int]) -> list[tuple[int, ...]]:
    return [(*size, 1, 1) for size in sizes]
