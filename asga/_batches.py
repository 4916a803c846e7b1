"""What a batch may be, and how its inputs are handed to a model.

A loader yields one of two forms:

- a pair ``(inputs, labels)``, where inputs are a tensor, a tuple or list of positional arguments, or a mapping of
  keyword arguments of the model's ``forward``;
- a mapping with the entry ``"labels"``, whose other entries are the keyword arguments, as Hugging Face's collators
  make it. The model is called without the labels: losses are computed outside of it.

Arguments need not be tensors; labels are one tensor, whose dimension 0 is the batch.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple | list | Mapping
Batch = tuple | list | Mapping

_FORMS = 'a pair (inputs, labels) or a mapping with the entry "labels" is needed, where labels is a tensor'


def split(batch: Batch) -> tuple[Inputs, Tensor]:
    """Inputs and labels of a batch.

    Raises:
        TypeError: It has neither form, or its labels are no tensor.
    """
    if isinstance(batch, Mapping):
        if not isinstance(batch.get("labels"), Tensor):
            entries = ", ".join(f"{name!r}: {type(value).__name__}" for name, value in batch.items())
            raise TypeError(f"a batch is a {type(batch).__name__} of {entries or 'nothing'}; {_FORMS}")
        return inputs_of(batch), batch["labels"]
    if not isinstance(batch, tuple | list):
        raise TypeError(f"a batch is a {type(batch).__name__}; {_FORMS}")
    if len(batch) != 2 or not isinstance(batch[0], Inputs) or not isinstance(batch[1], Tensor):
        kinds = ", ".join(type(part).__name__ for part in batch)
        several = "; several inputs go into a tuple: ((a, b), labels)" if len(batch) > 2 else ""
        raise TypeError(f"a batch is a {type(batch).__name__} of {kinds or 'nothing'}; {_FORMS}{several}")
    return batch[0], batch[1]


def inputs_of(batch: Tensor | Batch) -> Inputs:
    """Inputs of a batch whose labels, if there are any, do not matter.

    Args:
        batch: As for `split`, or without labels: a tensor, a tuple or list that holds the inputs alone, or a mapping.

    Raises:
        TypeError: There are no inputs in it.
    """
    if isinstance(batch, Mapping):
        inputs: object = {name: value for name, value in batch.items() if name != "labels"}
    else:
        inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(inputs, Inputs) or (not isinstance(inputs, Tensor) and len(inputs) == 0):
        raise TypeError(
            f"a batch is a {type(batch).__name__} without inputs; a tensor, a non-empty tuple or list that begins with "
            f"the inputs, or a mapping of keyword arguments is needed"
        )
    return inputs


def call(model: nn.Module, inputs: Inputs) -> object:
    """What a model gives for inputs of any form."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs) if isinstance(inputs, Tensor) else model(*inputs)


def to_device(value: object, device: torch.device) -> object:
    """`value` with the tensors in it, at any depth of containers, on a device."""
    return _map(lambda tensor: tensor.to(device), value)


def first_sample(inputs: Inputs) -> Inputs:
    """The first sample of a batch, as a batch of one.

    Tensors are cut along dimension 0 where that is as long as in the first tensor; others, such as a mask for all
    samples, stay whole.
    """
    size = next((len(tensor) for tensor in tensors_in(inputs) if tensor.dim() > 0), 0)
    return _map(lambda tensor: tensor[:1] if tensor.dim() > 0 and len(tensor) == size else tensor, inputs)


def all_finite(inputs: Inputs) -> bool:
    """Whether no tensor holds NaN or infinities."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(inputs))


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in containers of any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def _map(function: Callable[[Tensor], Tensor], value: object) -> object:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map(function, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_map(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
