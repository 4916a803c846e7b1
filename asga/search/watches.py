"""What a search looks for while it trains: a second class, and a gradient for every layer."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from asga.nn.layers import QuantizedLayer


class ClassWatch:
    """Looks at the labels of batches until there are two different ones: on one class every policy looks perfect.

    Args:
        batches: How many must come before it gives up: those of an epoch, as some loaders are sorted by class.
        whose: Who has the labels, for the message.
    """

    def __init__(self, batches: int, whose: str = "the proxy has") -> None:
        self._left, self._whose = batches, whose
        self._label: Tensor | None = None

    def see(self, labels: Tensor) -> None:
        """Look at the labels of the next batch; any but int64 ``[B]`` are no classes and pass.

        Raises:
            ValueError: All batches had the same label.
        """
        if self._left == 0 or labels.dtype != torch.int64 or labels.dim() != 1 or len(labels) == 0:
            return
        if self._label is None:
            self._label = labels[0].clone()
        self._left -= 1
        if (labels != self._label).any():
            self._left = 0
        elif self._left == 0:
            raise ValueError(
                f"{self._whose} a single class: every policy would look perfect on it. All labels are "
                f"{self._label.item()}; a loader that is sorted by class must be shuffled"
            )


class GradientWatch:
    """Looks for a gradient of the loss in the logits of every searched layer, until it has found them all.

    A layer without one has an output that the loss does not depend on. Single batches can lack one by chance, where
    all activations of a small network are clipped. Its state is part of a checkpoint.

    Args:
        layers: The layers, by name.
    """

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        self._layers, self._said = layers, False
        self._missing = [name for name, layer in layers.items() if _logits(layer)]

    def see(self) -> None:
        """Look at the gradients of a step."""
        if self._missing:  # after the first step there are none in most models, so nothing is read from a GPU
            self._missing = [
                name
                for name in self._missing
                if any(p.grad is None or not p.grad.any() for p in _logits(self._layers[name]))
            ]

    def missing(self) -> list[str]:
        """The layers without a gradient so far; a warning names them, the first time."""
        if self._missing and not self._said:
            warnings.warn(
                f"the loss does not depend on the bits of {', '.join(map(repr, self._missing))} (an output that is not "
                f"used or is detached): there the policy follows from the costs alone",
                stacklevel=2,
            )
            self._said = True
        return list(self._missing)

    def state_dict(self) -> dict[str, object]:
        """The layers without a gradient so far."""
        return {"missing": list(self._missing)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over what `state_dict` gave."""
        self._missing = list(state["missing"])


def _logits(layer: QuantizedLayer) -> list[nn.Parameter]:
    """Of the mixtures of a layer that have a choice."""
    found = (getattr(quantizer, "logits", None) for quantizer in (layer.weight_quantizer, layer.act_quantizer))
    return [logits for logits in found if logits is not None and len(logits) > 1]
