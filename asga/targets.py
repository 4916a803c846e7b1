"""What deployment targets run: pairs of a weight's format and its input's, by kind of layer.

A pair is here if the target has a kernel for it, so that the operations and bytes that a budget counts are those of
the deployed model. A weight of 3 bits that a target would keep in 8 is not deployable there: it would cost 8 bits.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from asga.policy import WeightBits, did_you_mean

# Formats of the weight and of the input; None is float.
Pair = tuple[WeightBits | None, int | None]


@dataclass(frozen=True)
class Target:
    """What one target runs.

    Args:
        pairs: By kind of layer, what weight and input may be. Both float can be run everywhere and is left out.
        sources: The addresses of the documentation that says so.
        unsigned_inputs: Whether an input may have unsigned integers.
        multiples: By format, what both dimensions of a `Linear` weight must be multiples of.
    """

    pairs: Mapping[str, tuple[Pair, ...]]
    sources: tuple[str, ...]
    unsigned_inputs: bool = True
    multiples: Mapping[WeightBits, int] = field(default_factory=dict)


_TENSORRT = "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library"
_TORCH_TENSORRT = "https://docs.pytorch.org/TensorRT/tutorials/_rendered_examples/dynamo/torchao"

TARGETS: dict[str, Target] = {
    # Eight bits in QDQ format; fewer only in the weights of MatMulNBits, whose input is float. Tried out with 1.32: it
    # makes QLinearConv, QLinearMatMul and MatMulNBits (2, 4 or 8 bits) of these, and of other pairs a float product.
    "onnxruntime-cpu": Target(
        pairs={"Conv2d": ((8, 8),), "Linear": ((8, 8), (2, None), (4, None), (8, None))},
        sources=(
            "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
            "https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits",
        ),
    ),
    # INT8 is signed, [-128, 127]. INT4 is for weights of matrix products only, whose input stays float. FP8 and FP4
    # products take inputs of the same type; with the weight alone in it, the input stays float.
    "tensorrt": Target(
        pairs={"Conv2d": ((8, 8),), "Linear": ((8, 8), (4, None), ("fp4", None), ("fp8", None))},
        sources=(
            f"{_TENSORRT}/quantized-types-schemes.html",
            f"{_TENSORRT}/quantized-types-explicit-quantization.html",
            f"{_TORCH_TENSORRT}/quantize_linear_nvfp4_woq.html",
            f"{_TORCH_TENSORRT}/quantize_linear_fp8_woq.html",
        ),
        unsigned_inputs=False,
        multiples={"fp4": 16},
    ),
    # Compressed weights have float inputs; NNCF compresses convolutions to 8 bits only. Its fp4 is MXFP4, not NVFP4.
    "openvino-cpu": Target(
        pairs={"Conv2d": ((8, 8), (8, None)), "Linear": ((8, 8), (4, None), (8, None))},
        sources=(
            "https://docs.openvino.ai/2024/documentation/openvino-ir-format/intermediate-representation-int8-inference.html",
            "https://github.com/openvinotoolkit/nncf/blob/develop/docs/compression_algorithms/CompressWeights.md",
        ),
    ),
    # Symmetric 8-bit weights and asymmetric 8-bit inputs; no weight-only quantization.
    "executorch-xnnpack": Target(
        pairs={"Conv2d": ((8, 8),), "Linear": ((8, 8),)},
        sources=("https://docs.pytorch.org/executorch/stable/backends/xnnpack/xnnpack-quantization.html",),
    ),
}


def find_target(name: str) -> Target | None:
    """The target of a name; None for ``"any"``, which restricts nothing.

    Raises:
        ValueError: There is no such target.
    """
    if name == "any":
        return None
    if name not in TARGETS:
        known = ["any", *TARGETS]
        hint = did_you_mean(str(name), known)
        raise ValueError(f"target is {name!r}; it must be one of {', '.join(map(repr, known))}{hint}")
    return TARGETS[name]


def check_target(
    name: str,
    layers: Mapping[str, nn.Module],
    candidates: Mapping[str, tuple[Sequence[WeightBits | None], Sequence[int | None]]],
) -> None:
    """Check that a target can run all that may be chosen for a model's layers.

    Args:
        name: Of the target.
        layers: `Conv2d` and `Linear` layers by name.
        candidates: For some of them, what the weight may be and what the input may be, in any combination.

    Raises:
        ValueError: There is no such target, or it cannot run a combination; the message has all of these, and what
            the target can run.
    """
    target = find_target(name)
    if target is None:
        return
    refused: dict[str, list[str]] = {}
    for layer, (weights, inputs) in candidates.items():
        text = _refused(target, layers[layer], weights, inputs)
        if text:
            refused.setdefault(text, []).append(layer)
    if refused:
        lines = [f"{name} cannot run, as weights x inputs:"]
        lines += [f"  {text}, for {_listed(names)}" for text, names in refused.items()]
        lines += ["It runs:"]
        lines += [f"  {kind}: {', '.join(map(_pair, pairs))}" for kind, pairs in target.pairs.items()]
        lines += [f"Sources: {', '.join(target.sources)}"]
        raise ValueError("\n".join(lines))


def _refused(
    target: Target, layer: nn.Module, weights: Sequence[WeightBits | None], inputs: Sequence[int | None]
) -> str:
    """The combinations that the target cannot run, as text; empty if there are none."""
    kind = "Conv2d" if isinstance(layer, nn.Conv2d) else "Linear"
    runs = [*target.pairs[kind], (None, None)]
    parts = []
    for weight in weights:
        multiple = target.multiples.get(weight, 1)
        fits = all(size % multiple == 0 for size in layer.weight.shape)
        refused = [act for act in inputs if (weight, act) not in runs or not fits]
        if refused:
            parts.append(f"{_name(weight)} x {'/'.join(map(_name, refused))}")
        if not fits and any((weight, act) in runs for act in inputs):
            parts[-1] += f" (weight {tuple(layer.weight.shape)}, multiples of {multiple} are needed)"
    return f"{kind}: {', '.join(parts)}" if parts else ""


def _name(bits: WeightBits | None) -> str:
    if bits is None:
        return "float"
    return bits if isinstance(bits, str) else f"int{bits}"


def _pair(pair: Pair) -> str:
    return " x ".join(map(_name, pair))


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = [repr(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
