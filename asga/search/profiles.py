"""What the costs need to know about each layer, found by running the model once."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from asga._batches import Inputs, call, tensors_in
from asga._modes import modes_kept
from asga.nn.quantizable import tied_layers
from asga.policy import did_you_mean

ExampleInputs = Inputs


@dataclass(frozen=True)
class LayerProfile:
    """What the costs need to know about one layer.

    Args:
        name: Of the module in the model.
        kind: ``"Conv2d"`` or ``"Linear"``.
        macs: Multiply-accumulates of one sample.
        weight_numel: Elements of the weight.
        out_channels: Output channels or features: the number of weight scales.
        in_numel: Elements of the input for one sample, of the largest input where the layer is called more than
            once; None where it is not known.
        latency_ns: Triples of weight bits, activation bits and nanoseconds; see `asga.search.latency`.
        tied_to: The first of the layers that have this one's weight parameter, which may be itself; None where no other
            has.
    """

    name: str
    kind: str
    macs: int
    weight_numel: int
    out_channels: int
    in_numel: int | None = None
    latency_ns: tuple[tuple[int | None, int | None, int], ...] = ()
    tied_to: str | None = None

    def __post_init__(self) -> None:
        # From JSON these come as lists. The dataclass is frozen, so this is the way to put them in place.
        object.__setattr__(self, "latency_ns", tuple(tuple(entry) for entry in self.latency_ns))

    @cached_property
    def times(self) -> dict[tuple[int | None, int | None], int]:
        """`latency_ns` by weight and activation bits."""
        return {(weight_bits, act_bits): time for weight_bits, act_bits, time in self.latency_ns}


def profile_layers(
    model: nn.Module, example_inputs: ExampleInputs, names: Iterable[str], *, unused: Collection[str] = ()
) -> dict[str, LayerProfile]:
    """Measure layers by running the model once, in eval mode and without gradients.

    MACs come from the shapes met on the way, so strides, dilation, groups and inputs of any rank are counted
    rightly, and a layer called twice counts twice. Training mode, buffers, hooks and the random state of CPU
    and CUDA are afterwards what they were, also when the model raises.

    Args:
        model: Its `Conv2d` and `Linear` layers may be plain or those of `asga.nn`, calibrated.
        example_inputs: A tensor, positional arguments, or a dict of keyword arguments, on the model's device.
            Dimension 0 of the first tensor is the batch; what is counted is divided by its size. The other
            dimensions decide the costs: use the resolution that they are to be for.
        names: The layers to measure, such as `SpaceChoices.names`.
        unused: Those that need not be called, such as `SpaceChoices.excluded`; without a call they have no MACs.

    Returns:
        Profiles in the order of `names`.

    Raises:
        TypeError: A named module is neither `Conv2d` nor `Linear`, or there is no tensor in `example_inputs`.
        ValueError: A name is not in the model, a layer not in `unused` was never called, or the batch is empty.
    """
    layers = {name: get_layer(model, name) for name in names}
    batch = _batch_size(example_inputs)
    macs, in_numel = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def counter(name: str) -> Callable[[nn.Module, tuple, dict, Tensor], None]:
        macs_per_output = layers[name].weight[0].numel()

        def count(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            macs[name] += output.numel() * macs_per_output
            in_numel[name] = max(in_numel[name], layer_input(args, kwargs).numel())

        return count

    handles = [layer.register_forward_hook(counter(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        run_once(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    tied = tied_layers(layers)
    missed = [name for name in layers if macs[name] == 0 and name not in unused]
    if missed:
        raise ValueError(
            f"never called by the model's forward: {', '.join(map(repr, missed))}. Without a call a layer's cost is "
            f"unknown: give example_inputs that reach it, exclude it from the search, or take it out of the model"
        )
    return {
        name: LayerProfile(
            name=name,
            kind="Conv2d" if isinstance(layer, nn.Conv2d) else "Linear",
            macs=-(-macs[name] // batch),
            weight_numel=layer.weight.numel(),
            out_channels=layer.weight.shape[0],
            in_numel=-(-in_numel[name] // batch),
            tied_to=tied.get(name),
        )
        for name, layer in layers.items()
    }


def run_once(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Run a model in eval mode and without gradients, for what hooks see of it, and leave it as it was.

    Args:
        model: Any module.
        example_inputs: As for `profile_layers`.
    """
    with left_as_found(model, example_inputs), torch.no_grad():
        call(model.eval(), example_inputs)


@contextmanager
def left_as_found(model: nn.Module, example_inputs: ExampleInputs) -> Iterator[None]:
    """Put modes, buffers and random state back after the model was run; it may replace a buffer or write into it."""
    buffers_of = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    tensors = [*model.parameters(), *model.buffers(), *tensors_in(example_inputs)]
    cuda_devices = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    with modes_kept(model), torch.random.fork_rng(devices=sorted(cuda_devices)):
        try:
            yield
        finally:
            for module, buffers in buffers_of:
                module._buffers.clear()
                module._buffers.update(buffers)
            with torch.no_grad():
                for buffer, value in values:
                    buffer.copy_(value)


def layer_input(args: tuple, kwargs: dict) -> Tensor:
    """The input of a `Conv2d` or `Linear`, however it was passed."""
    return args[0] if args else kwargs["input"]


def get_layer(model: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    """A layer by its name.

    Raises:
        TypeError: It is neither `Conv2d` nor `Linear`.
        ValueError: There is none of this name.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        hint = did_you_mean(name, [n for n, _ in model.named_modules()])
        raise ValueError(f"the model has no module {name!r}{hint}") from None
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise TypeError(f"module {name!r} is a {type(layer).__name__}; costs are known for Conv2d and Linear")
    return layer


def _batch_size(example_inputs: ExampleInputs) -> int:
    first = next(tensors_in(example_inputs), None)
    if first is None:
        raise TypeError(f"example_inputs is {example_inputs!r}; it has no tensor, so no batch size")
    shape = tuple(first.shape)
    if not shape or shape[0] == 0:
        raise ValueError(f"example_inputs begins with shape {shape}; a batch of at least one is needed")
    return shape[0]
