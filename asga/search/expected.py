"""The expected cost of a mixture, differentiable in its probabilities."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from asga.nn import QuantizedLayer
from asga.search.costs import PEAKS, cost_tables
from asga.search.profiles import LayerProfile
from asga.search.space import SpaceChoices


class ExpectedCosts:
    """Expected costs of a model of mixtures, divided by their limits.

    The choices for weight and input are independent, so the expected cost of a layer with table C is
    ``p_weight' C p_act``. That of a model is their sum; for a peak (`asga.search.costs.PEAKS`) their maximum, which is
    less than the expectation of the maximum, but goes to the same as the probabilities become certain. Layers with
    tables of one shape are computed together, all metrics at once.

    Args:
        layers: The quantized layers of the model, by name.
        profiles: What they cost.
        choices: Their candidates.
        limits: By metric.
    """

    def __init__(
        self,
        layers: Mapping[str, QuantizedLayer],
        profiles: Mapping[str, LayerProfile],
        choices: SpaceChoices,
        limits: Mapping[str, int],
    ) -> None:
        self._metrics = tuple(limits)
        device = next(layer.weight.device for layer in layers.values())
        peaks = [metric in PEAKS for metric in limits]
        self._peaks = torch.tensor(peaks, device=device) if any(peaks) else None
        tables = cost_tables(profiles, choices)
        shapes = {name: table.shape for name, table in tables[self._metrics[0]].items()}
        self._fixed = torch.zeros(len(limits), device=device)
        self._stacks: list[tuple[Tensor, list[nn.Module], list[nn.Module]]] = []
        for shape in dict.fromkeys(shapes.values()):
            names = [name for name in shapes if shapes[name] == shape]
            # [metrics, layers, weight candidates, act candidates]
            shares = torch.tensor(
                [[(tables[metric][name] / limit).tolist() for name in names] for metric, limit in limits.items()],
                device=device,
            )
            if shape == (1, 1):
                self._fixed = self._total(shares.flatten(1))
                continue
            weights = [layers[name].weight_quantizer for name in names]
            acts = [layers[name].act_quantizer for name in names]
            self._stacks.append((shares, weights, acts))

    def __call__(self, probs: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
        """By metric the expected cost divided by its limit, 0-dim.

        Args:
            probs: By logits, as of `Relaxation.probs`.
        """
        layers = [self._fixed[:, None]]
        for shares, weights, acts in self._stacks:
            of_weight, of_act = _stack(weights, probs, self._fixed), _stack(acts, probs, self._fixed)
            layers.append(torch.einsum("lw,mlwa,la->ml", of_weight, shares, of_act))
        return dict(zip(self._metrics, self._total(torch.cat(layers, 1)).unbind(), strict=True))

    def _total(self, layers: Tensor) -> Tensor:
        """Costs of the model ``[metrics]`` from those of its layers ``[metrics, layers]``."""
        if self._peaks is None:
            return layers.sum(1)
        return torch.where(self._peaks, layers.amax(1), layers.sum(1))


def _stack(quantizers: list[nn.Module], probs: Mapping[nn.Parameter, Tensor], like: Tensor) -> Tensor:
    """Probabilities ``[layers, candidates]``; certainty where there is no mixture."""
    certain = like.new_ones(1)
    return torch.stack([probs[q.logits] if hasattr(q, "logits") else certain for q in quantizers])
