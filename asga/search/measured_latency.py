"""Timing layers with the kernels that PyTorch has on this device.

PyTorch has no general kernels below 8 bits, and not everywhere those of 8:

- ``int8``: on CPUs oneDNN's convolution and product of uint8 inputs and int8 weights with a uint8 result; on GPUs the
  product of int8 matrices with an int32 result (`torch._int_mm`), where its shapes allow it, and no convolution.
- ``bfloat16``: the layer in that type.
- the layer as it is, in the type of its weights.

A pair of bits takes the time of the fastest of those that can hold it: for integers any of the three, for small floats
not int8, and for a layer whose weight or input stays float the layer as it is. So 2 bits take as long here as 8, and on
such a device a limit on the latency can only tell quantized layers from float ones. Where a target has kernels of fewer
bits, measure there with its own tools, and read that table (`asga.search.latency.LatencyTable.from_csv`).

Measured is the layer alone, its input and weight being in the kernel's type; turning them into it is not.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from asga._batches import to_device
from asga.policy import bit_width
from asga.search.profiles import ExampleInputs, get_layer, layer_input, run_once

# Long enough for a median of many runs of a layer, short enough for the some 50 measurements of a usual model.
_SECONDS = 0.1

Bits = int | None
Run = Callable[[], object]


def measure_layers(
    model: nn.Module,
    example_inputs: ExampleInputs,
    pairs: Mapping[str, Iterable[tuple[Bits, Bits]]],
    *,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[tuple[str, Bits, Bits], tuple[int, str]]:
    """Time layers; equal layers with equal inputs are measured once.

    Args:
        model: A float model; left as it is.
        example_inputs: What it is run with, batch size and resolution included.
        pairs: By layer the weight and activation bits that are asked for.
        device: Where to measure; None: where the model is.
        progress: Called after every measurement with how many are done, and how many there are.

    Returns:
        By layer and bits the median time in nanoseconds and the name of the kernel. A layer that is called more than
        once takes the sum of its calls, one that stays float and is never called no time.

    Raises:
        ValueError: Another layer is never called.
    """
    if device is None:
        device = next(model.parameters()).device
    elif any(parameter.device != torch.device(device) for parameter in model.parameters()):
        model = copy.deepcopy(model).to(device)
    calls = _calls(model, to_device(example_inputs, torch.device(device)), pairs)
    wanted = {(call.key, kernel): (call, kernel) for name in pairs for call in calls[name] for kernel in _KERNELS}
    times: dict[tuple, int | None] = {}
    for (key, kernel), (call, _) in wanted.items():
        try:
            times[key, kernel] = _time(_KERNELS[kernel](call.layer, call.input))
        except RuntimeError:  # torch's, of a kernel that this device has not, or not for this shape
            if kernel == "own":
                raise
            times[key, kernel] = None
        if progress is not None:
            progress(len(times), len(wanted))

    measured = {}
    for name, wished in pairs.items():
        own = str(get_layer(model, name).weight.dtype).removeprefix("torch.")
        sums = {kernel: [times[call.key, kernel] for call in calls[name]] for kernel in _KERNELS}
        for pair in wished:
            possible = {k: sum(sums[k]) for k in _holding(pair) if None not in sums[k]}
            fastest = min(possible, key=possible.get)
            measured[(name, *pair)] = possible[fastest], own if fastest == "own" else fastest
    return measured


def _holding(pair: tuple[Bits, Bits]) -> Iterator[str]:
    """The kernels that lose nothing of tensors with these bits."""
    if all(isinstance(bits, int) for bits in pair):
        yield "int8"
    if all(bit_width(bits) <= 8 for bits in pair):  # small floats have at most 4 bits of mantissa, bfloat16 has 8
        yield "bfloat16"
    yield "own"


@dataclass(frozen=True)
class _Call:
    """A layer and what it was called with."""

    layer: nn.Conv2d | nn.Linear
    input: Tensor

    @property
    def key(self) -> tuple:
        """Equal for calls that take the same time."""
        layer, weight = self.layer, self.layer.weight
        geometry = ("stride", "padding", "dilation", "groups", "padding_mode")
        how = tuple(getattr(layer, name, None) for name in geometry)
        return (weight.shape, weight.dtype, layer.bias is None, how, self.input.shape, self.input.stride())


def _calls(
    model: nn.Module, example_inputs: ExampleInputs, pairs: Mapping[str, Iterable[tuple[Bits, Bits]]]
) -> dict[str, list[_Call]]:
    calls: dict[str, list[_Call]] = {name: [] for name in pairs}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            calls[name].append(_Call(layer, layer_input(args, kwargs)))

        return hook

    handles = [get_layer(model, name).register_forward_pre_hook(note(name), with_kwargs=True) for name in calls]
    try:
        run_once(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    unused = [name for name, found in calls.items() if not found and set(pairs[name]) != {(None, None)}]
    if unused:
        raise ValueError(f"never called by the model's forward: {', '.join(map(repr, unused))}")
    return calls


def _time(run: Run | None) -> int | None:
    """The median time of a run in nanoseconds; None if the device cannot do it."""
    if run is None:
        return None
    with torch.inference_mode():
        run()
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        return round(timer.blocked_autorange(min_run_time=_SECONDS).median * 1e9)


def _own(layer: nn.Module, input: Tensor) -> Run:
    return partial(layer.forward, input)


def _bfloat16(layer: nn.Module, input: Tensor) -> Run:
    return partial(copy.deepcopy(layer).to(torch.bfloat16).forward, input.to(torch.bfloat16))


def _int8(layer: nn.Conv2d | nn.Linear, input: Tensor) -> Run | None:
    weight = torch.randint(-128, 128, layer.weight.shape, dtype=torch.int8, device=input.device)
    if input.is_cuda:
        rows = torch.zeros(input.numel() // input.shape[-1], input.shape[-1], dtype=torch.int8, device=input.device)
        return partial(torch._int_mm, rows, weight.t()) if isinstance(layer, nn.Linear) else None
    return _onednn(layer, torch.zeros(input.shape, dtype=torch.uint8), weight)


def _onednn(layer: nn.Conv2d | nn.Linear, input: Tensor, weight: Tensor) -> Run | None:
    """oneDNN's int8 layer with zero point 0 and a scale per output channel, as PyTorch's compiler uses it on CPUs."""
    onednn, channels = torch.ops.onednn, weight.shape[0]
    per_channel = torch.ones(channels), torch.zeros(channels, dtype=torch.int64)
    bias = None if layer.bias is None else layer.bias.detach().float()
    result = (1.0, 0, torch.uint8, "none", [], "")
    try:
        if isinstance(layer, nn.Linear):
            packed = onednn.qlinear_prepack(weight, list(input.shape))
            return partial(onednn.qlinear_pointwise, input, 1.0, 0, packed, *per_channel, bias, *result)
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return None
        input = input.contiguous(memory_format=torch.channels_last)
        how = layer.stride, layer.padding, layer.dilation, layer.groups
        packed = onednn.qconv_prepack(weight, per_channel[0], 1.0, 0, *how, list(input.shape))
        return partial(onednn.qconv_pointwise, input, 1.0, 0, packed, *per_channel, bias, *how, *result)
    except AttributeError:  # a PyTorch without oneDNN
        return None


_KERNELS: dict[str, Callable[[nn.Module, Tensor], Run | None]] = {"int8": _int8, "bfloat16": _bfloat16, "own": _own}
