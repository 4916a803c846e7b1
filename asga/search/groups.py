"""Layers that must share bits: named by hand, or found by running the model once and following its tensors."""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from asga._batches import tensors_in
from asga.search.profiles import ExampleInputs, layer_input, run_once

SIDES = ("weight", "act")
_OTHER_SHAPE = ""  # no layer has this name


@dataclass(frozen=True)
class Group:
    """Layers that have the same bits in every policy.

    Args:
        layers: Their names, or patterns as in `SearchSpace`.
        share: ``"weight"`` or ``"act"`` bits, or ``"both"``.

    Raises:
        TypeError: `layers` is not a sequence of strings.
        ValueError: `share` is something else, or there is no layer.
    """

    layers: Sequence[str]
    share: str = "both"

    def __post_init__(self) -> None:
        if not is_names(self.layers):
            raise TypeError(f"layers of a group are {self.layers!r}; a sequence of names or patterns is needed")
        if not self.layers:
            raise ValueError("a group has no layers; at least one name or pattern is needed")
        if self.share not in (*SIDES, "both"):
            raise ValueError(f"share of a group is {self.share!r}; it must be 'weight', 'act' or 'both'")
        object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that are shared."""
        return SIDES if self.share == "both" else (self.share,)


def is_names(value: object) -> bool:
    """Whether it is a collection of strings; one string is none, nor is what can be run through only once."""
    return isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(name, str) for name in value)


def find_groups(model: nn.Module, example_inputs: ExampleInputs, layers: Sequence[str], rule: str) -> list[Group]:
    """The groups that a rule finds in a model, by running it once.

    - ``"residual"``: layers that read tensors which meet in an addition share their activation bits. What a runtime
      adds has one type (ONNX Runtime's ``QLinearAdd`` and TFLite's ``ADD`` take two inputs and give an output of the
      same type), and a tensor that two layers read is stored once. In a ResNet these are the first layers of all
      blocks of a stage, and those of the next that read its result.
    - ``"qkv"``: linear layers that read the same tensor share weight and activation bits. Runtimes make one product
      of them (query, key and value; gate and up), with one format: see `packed_modules_mapping` of vLLM. Layers that
      read different parts of a tensor do not.
    - ``"depthwise"``: a depthwise convolution and the 1x1 convolution after it, with only norms and activation
      functions between, share weight and activation bits, as kernels that fuse the two need. What changes the shape,
      such as the pooling of a squeeze-and-excitation block, is no such function.

    Args:
        model: Any module; it is left as it was.
        example_inputs: As for `asga.search.profiles.profile_layers`.
        layers: Names of its quantizable layers.
        rule: ``"residual"``, ``"qkv"`` or ``"depthwise"``.

    Returns:
        Groups of at least two layers each.
    """
    found = RULES[rule](_trace(model, example_inputs, layers), {name: model.get_submodule(name) for name in layers})
    return [group for group in found if len(group.layers) > 1]


def joined(groups: Iterable[Iterable[Hashable]]) -> list[list[Hashable]]:
    """Join groups that have a member in common, until none have."""
    apart: list[dict[Hashable, None]] = []
    for members in groups:
        group = dict.fromkeys(members)
        meeting = [other for other in apart if not other.keys().isdisjoint(group)]
        apart = [other for other in apart if other.keys().isdisjoint(group)]
        apart.append(dict.fromkeys(chain(*meeting, group)))
    return [list(group) for group in apart]


@dataclass
class _Flow:
    """How tensors flow between layers.

    A *value* is what an operation computed, by number. Operations that leave a quantized tensor on its grid (views,
    ReLU, pooling by maximum, padding with zeros) hand their input's value on.

    Attributes:
        reads: By layer, the values that it reads, and which part of each: where in memory it begins, how long it is.
        sources: By value, the layers that it comes from without another layer in between, and `_OTHER_SHAPE` where its
            shape was changed since.
        sums: Values that meet in an addition, and the value of their sum.
    """

    reads: dict[str, list[tuple[int, tuple[int, int]]]] = field(default_factory=dict)
    sources: list[frozenset[str]] = field(default_factory=list)
    sums: list[tuple[int, ...]] = field(default_factory=list)

    def new_value(self, sources: frozenset[str] = frozenset()) -> int:
        self.sources.append(sources)
        return len(self.sources) - 1


def _residual(flow: _Flow, layers: Mapping[str, nn.Module]) -> list[Group]:
    streams = {value: stream for stream, values in enumerate(joined(flow.sums)) for value in values}
    return _readers(flow, layers, lambda read: streams.get(read[0]), "act")


def _same_input(flow: _Flow, layers: Mapping[str, nn.Module]) -> list[Group]:
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    return _readers(flow, linear, lambda read: read, "both")


def _readers(
    flow: _Flow, layers: Iterable[str], place_of: Callable[[tuple[int, tuple[int, int]]], Hashable], share: str
) -> list[Group]:
    """The layers that read from the same place; what has none (None) does not count."""
    readers: dict[Hashable, dict[str, None]] = {}
    for name in layers:
        for place in map(place_of, flow.reads.get(name, ())):
            if place is not None:
                readers.setdefault(place, {})[name] = None
    return [Group(tuple(names), share) for names in readers.values()]


def _depthwise(flow: _Flow, layers: Mapping[str, nn.Module]) -> list[Group]:
    groups = []
    for name, layer in layers.items():
        if not isinstance(layer, nn.Conv2d) or layer.kernel_size != (1, 1) or layer.groups > 1:
            continue
        sources = frozenset().union(*(flow.sources[value] for value, _ in flow.reads.get(name, ())))
        before = [layers[source] for source in sources if source != _OTHER_SHAPE]
        if len(before) == len(sources) == 1 and _is_depthwise(before[0]):
            groups.append(Group((*sources, name)))
    return groups


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


RULES: dict[str, Callable[[_Flow, Mapping[str, nn.Module]], list[Group]]] = {
    "residual": _residual,
    "qkv": _same_input,
    "depthwise": _depthwise,
}


def _trace(model: nn.Module, example_inputs: ExampleInputs, layers: Iterable[str]) -> _Flow:
    flow = _Flow()
    tracer = _Tracer(flow, example_inputs)
    handles = []
    for name in layers:
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(tracer.before(name), with_kwargs=True))
        handles.append(layer.register_forward_hook(tracer.after(name)))
    try:
        with tracer:
            run_once(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return flow


_aten = torch.ops.aten
_ADDITIONS = {_aten.add.Tensor, _aten.add_.Tensor}
_KEEP_THE_GRID = {
    *(_aten.relu.default, _aten.relu_.default, _aten.hardtanh.default, _aten.hardtanh_.default),
    *(_aten.clamp.default, _aten.clamp_.default, _aten.clamp_min.default, _aten.clamp_min_.default),
    *(_aten.max_pool2d_with_indices.default, _aten.adaptive_max_pool2d.default, _aten.constant_pad_nd.default),
    *(_aten.clone.default, _aten._to_copy.default),
}


class _Tracer(TorchDispatchMode):
    """Sees every operation of ATen below the model's code, whatever that calls.

    Tensors are told apart by their storage, so a view has the value of its base. All are kept until the end: a
    storage that is freed could come back as another tensor's.
    """

    def __init__(self, flow: _Flow, example_inputs: ExampleInputs) -> None:
        super().__init__()
        self._flow = flow
        self._values: dict[int, int] = {}
        self._kept: list[Tensor] = []
        for tensor in tensors_in(example_inputs):
            self._assign(tensor, flow.new_value())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = list(tensors_in((args, kwargs)))
        values = [self._values.get(_storage(tensor)) for tensor in tensors]
        known = [value for value in values if value is not None]
        outputs = func(*args, **kwargs)
        storages = {_storage(tensor) for tensor in tensors}
        # What depends on no input of the model, such as a parameter, is no activation.
        computed = [t for t in tensors_in(outputs) if func._schema.is_mutable or _storage(t) not in storages]
        if known and computed:
            value = known[0] if func in _KEEP_THE_GRID else self._compute(func, tensors, values, computed[0].shape)
            for tensor in computed:
                self._assign(tensor, value)
        return outputs

    def before(self, name: str) -> Callable[..., None]:
        """A hook that notes what a layer reads."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensor = layer_input(args, kwargs)
            if _storage(tensor) not in self._values:
                self._assign(tensor, self._flow.new_value())
            part = tensor.storage_offset(), tensor.numel()
            self._flow.reads.setdefault(name, []).append((self._values[_storage(tensor)], part))

        return hook

    def after(self, name: str) -> Callable[..., None]:
        """A hook that notes where a layer's output comes from."""

        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            self._assign(output, self._flow.new_value(frozenset([name])))

        return hook

    def _compute(self, func: object, tensors: Sequence[Tensor], values: Sequence[int | None], shape: torch.Size) -> int:
        known = [value for value in values if value is not None]
        sources = frozenset().union(*(self._flow.sources[v] for v in known))
        shapes = [tensor.shape for tensor, value in zip(tensors, values, strict=True) if value is not None]
        value = self._flow.new_value(sources if shape in shapes else sources | {_OTHER_SHAPE})
        # An addition of other shapes adds a bias or an embedding, not a branch.
        if func in _ADDITIONS and len(known) == 2 and tensors[0].shape == tensors[1].shape:
            self._flow.sums.append((*known, value))
        return value

    def _assign(self, tensor: Tensor, value: int) -> None:
        self._values[_storage(tensor)] = value
        self._kept.append(tensor)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
