"""What is measured: tensors of real networks and sweeps over sizes, with the bytes that each must move."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
        kind: "act" (one scale) or "weight" (one scale per channel, axis 0).
        shape: Of the tensor.
        bits: The candidates: one for `fake_quant`, several for `mixed_fake_quant`.
        dtype: Of the tensor; scales and probabilities are float32.
    """

    suite: str
    kind: str
    shape: tuple[int, ...]
    bits: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Such as ``core/weight-64x64x3x3/k5/float32``."""
        size = "x".join(map(str, self.shape))
        return f"{self.suite}/{self.kind}-{size}/k{len(self.bits)}/{str(self.dtype).removeprefix('torch.')}"

    @property
    def axis(self) -> int | None:
        """Dimension of the channels, as the operators take it."""
        return 0 if self.kind == "weight" else None

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

        Forward reads x and writes y; backward reads g and x and writes dx. Scales, probabilities and their gradients
        are too small to count, and reading a line of the cache to overwrite it is not counted, here or for the copy.

        Args:
            passes: "forward" or "forward+backward".
        """
        return {"forward": 2, "forward+backward": 5}[passes] * self.nbytes


def select(patterns: Sequence[str], batch_size: int) -> list[Case]:
    """The cases whose name matches one of the patterns, each tensor once (under its first name).

    Args:
        patterns: As a shell would match file names: ``core/*``, ``*/weight-*/k5/bfloat16``.
        batch_size: Of the activations of convolutional networks and vision transformers.

    Raises:
        ValueError: No case matches.
    """
    found: dict[tuple, Case] = {}
    for case in _all_cases(batch_size):
        if any(fnmatchcase(case.name, pattern) for pattern in patterns):
            found.setdefault((case.kind, case.shape, case.bits, case.dtype), case)
    if not found:
        raise ValueError(
            f"no case matches {' '.join(patterns)!r}; names look like 'core/weight-64x64x3x3/k5/float32', "
            f"and the suites are {', '.join(_suites(batch_size))}"
        )
    return list(found.values())


def _all_cases(batch_size: int) -> Iterator[Case]:
    for suite, tensors in _suites(batch_size).items():
        for kind, shapes in tensors.items():
            for shape in shapes:
                for bits in (SINGLE_BITS, MIXED_BITS):
                    for dtype in DTYPES:
                        yield Case(suite, kind, shape, bits, dtype)


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
