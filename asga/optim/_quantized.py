"""Perturbing the quantized weights of a model instead of its latent ones.

At two or three bits, a perturbation of a latent weight mostly vanishes under rounding. Here the gradient of the loss is
taken where it acts, at the quantized weight, and in pass 2 the perturbation is added behind the quantizer.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from asga.nn.layers import QuantizedLayer
from asga.nn.quantizer import Quantizer
from asga.optim._ranks import Ranks

_EAGER = "the model must run in eager mode, and what is compiled or traced before the optimizer is built does not"


def quantized_layers(model: nn.Module) -> Iterator[QuantizedLayer]:
    """The layers whose weights are quantized."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer) and isinstance(layer.weight_quantizer, Quantizer):
            yield layer


class QuantizedWeights:
    """The quantized weights of a model as the step sees them: their gradients, and what is added to them in pass 2.

    Hooks on the weight quantizers do the work in eager mode: torch.compile would leave them out of a graph.

    Args:
        model: With at least one quantized weight.
        rho_scale_of: The `rho_scale` of every parameter of the optimizer.

    Raises:
        ValueError: No quantized weight of the model is among the parameters.
    """

    def __init__(self, model: nn.Module, rho_scale_of: dict[Tensor, float]) -> None:
        self._scales: dict[nn.Module, float] = {}
        self.latent: set[Tensor] = set()
        for layer in quantized_layers(model):
            if layer.weight in rho_scale_of and layer.weight_quantizer not in self._scales:  # tied layers share it
                self._scales[layer.weight_quantizer] = rho_scale_of[layer.weight]
                self.latent.add(layer.weight)
                layer.weight_quantizer.register_forward_hook(_Hook(self))
        if not self._scales:
            raise ValueError("perturb is 'quantized', but the model has no quantized weight among the parameters")
        self._grads: dict[nn.Module, Tensor] = {}
        self._first: dict[nn.Module, Tensor] = {}
        self._offsets: dict[nn.Module, Tensor] = {}
        self._seen = False

    def clear(self) -> None:
        """Forget the gradients of a pass, as `zero_grad` does."""
        self._grads = {}

    def norm(self, ranks: Ranks) -> Tensor:
        """Their part of q0; the gradients are those of pass 1 from now on. Not averaged by DDP, they are here.

        Raises:
            RuntimeError: There is none, as where the model was compiled before the optimizer was built.
        """
        if not self._grads:
            raise RuntimeError(f"perturb is 'quantized', but no quantized weight got a gradient in pass 1: {_EAGER}")
        self._first, self._grads, self._seen = self._grads, {}, False
        grads = list(self._first.values())
        ranks.average_(grads)
        return sum(torch.ops.asga.sam_norm([g], [g], [self._scales[m]], False) for m, g in self._first.items())

    def perturb(self, step: Tensor) -> None:
        """Add ``s T^2 g0`` to the quantized weights of the forward passes to come, nothing where s is 0."""
        for quantizer, grad in self._first.items():
            size = (step * self._scales[quantizer] ** 2).to(grad.device, grad.dtype)
            # 0 * Inf is NaN.
            self._offsets[quantizer] = torch.where(size != 0, size * grad, 0.0)

    def check_perturbed(self) -> None:
        """Refuse a pass 2 that no perturbation was part of.

        Raises:
            RuntimeError: It was none.
        """
        if not self._seen:
            raise RuntimeError(f"perturb is 'quantized', but pass 2 ran without any perturbation: {_EAGER}")

    def product(self, device: torch.device) -> Tensor:
        """Their part of ``<T g0, T g1>``, 0-dim float64."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for quantizer, first in self._first.items():
            second = self._grads.get(quantizer)
            if second is not None:
                scale = self._scales[quantizer]
                total = total + torch.ops.asga.sam_dots([first], [first], [second], [scale], False)[3].to(device)
        return total

    def restore(self) -> None:
        """End of a step: nothing is added any more."""
        self._grads, self._first, self._offsets = {}, {}, {}

    def output(self, quantizer: nn.Module, output: Tensor) -> Tensor | None:
        """What a quantizer is to return instead of its output; None: its output."""
        offset = self._offsets.get(quantizer)
        if offset is not None:
            # Without gradients, too: reentrant checkpointing computes the loss like that.
            output, self._seen = output + offset, True
        if output.requires_grad:
            output.register_hook(lambda grad: self._add(quantizer, grad))
        return None if offset is None else output

    def _add(self, quantizer: nn.Module, grad: Tensor) -> None:
        known = self._grads.get(quantizer)
        # The gradient itself may be written into by what comes behind.
        self._grads[quantizer] = grad.detach().clone() if known is None else known + grad


class _Hook:
    """Of a quantizer. Copies of the model, as for averages of weights, have no part in the steps of an optimizer."""

    def __init__(self, weights: QuantizedWeights) -> None:
        self._weights = weights

    def __call__(self, quantizer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return self._weights.output(quantizer, output)

    def __deepcopy__(self, memo: dict[int, object]) -> Callable[..., None]:
        return _no_hook


def _no_hook(quantizer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    return None
