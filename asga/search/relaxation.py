"""The relaxation: probabilities of all candidates of all layers, computed at once, with or without noise."""

import torch
from torch import Tensor, nn

from asga.nn import MixedActQuantizer, MixedWeightQuantizer

RELAXATIONS = ("gumbel", "softmax")


class Relaxation:
    """The logits of a model's mixtures, and the weights of the candidates that are made of them.

    ``"gumbel"``: a mixture believes in ``p = softmax(logits)`` and weighs its candidates by a sample,
    ``softmax((logits + noise) / T)`` with Gumbel noise, which as T falls becomes a draw of one candidate with
    probability p. The noise stays until the next `draw`, so that both passes of a step see the same network.
    ``"softmax"``: it weighs them by ``p = softmax(logits / T)``, and p is what it believes.

    A weighted mean of candidates hides what one of them does alone: the others make up for it. With MobileNet-V2 the
    softmax gave 2 bits, at a probability of 0.4, to an activation that 2 bits wipe out, and the policy never recovered;
    samples show the loss of every candidate (bench/results/transfer-study.md).

    Every forward of the model computes the weights of all its mixtures together: a few operations instead of a few
    for each. Mixtures that share a logits parameter share everything.

    Args:
        model: With mixtures; from now on these share one temperature.
        kind: One of `RELAXATIONS`.

    Attributes:
        logits: The parameters, each once.

    Raises:
        ValueError: `kind` is not known.

    Source:
        Cai and Vasconcelos, "Rethinking Differentiable Search for Mixed-Precision Neural Networks" (EdMIPS), CVPR
        2020. Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017; for bit-widths, Wu et al.,
        "Mixed Precision Quantization of ConvNets via Differentiable Neural Architecture Search", 2018.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        check_relaxation(kind)
        self._mixtures = [m for m in model.modules() if isinstance(m, MixedWeightQuantizer | MixedActQuantizer)]
        self.logits = list(dict.fromkeys(mixture.logits for mixture in self._mixtures))
        # Parameters of one length are stacked.
        sizes = sorted({len(parameter) for parameter in self.logits})
        self._stacks = [[parameter for parameter in self.logits if len(parameter) == size] for size in sizes]
        self._gumbel = kind == "gumbel"
        self._noise = [torch.zeros_like(torch.stack(stack), requires_grad=False) for stack in self._stacks]
        self._temperature = self._mixtures[0].temperature
        for mixture in self._mixtures:
            mixture.temperature = self._temperature
        self._hooks = [
            model.register_forward_pre_hook(lambda *_: self._weigh()),
            model.register_forward_hook(lambda *_: self._release(), always_call=True),
        ]

    def remove(self) -> None:
        """Leave the model to itself: every mixture takes the softmax of its own logits again."""
        for hook in self._hooks:
            hook.remove()

    def set_temperature(self, temperature: float) -> None:
        """Set T, of all mixtures."""
        self._temperature.fill_(temperature)

    def draw(self) -> None:
        """Draw the noise of the next step, from torch's global generator; with softmax there is none."""
        if self._gumbel:
            tiny = torch.finfo(torch.float32).tiny  # an exponential variable of zero would be infinite noise
            for noise in self._noise:
                noise.exponential_().clamp_(min=tiny).log_().neg_()

    def probs(self) -> dict[nn.Parameter, Tensor]:
        """What the search believes: by logits the probabilities ``[K]``, differentiable."""
        return self._by_logits([torch.softmax(self._cooled(torch.stack(stack)), 1) for stack in self._stacks])

    @torch.no_grad()
    def log_probs(self) -> dict[nn.Parameter, tuple[float, ...]]:
        """The same, as logarithms."""
        return {p: tuple(torch.log_softmax(self._cooled(p.double()), 0).tolist()) for p in self.logits}

    def _weigh(self) -> None:
        noisy = [torch.stack(stack) + noise for stack, noise in zip(self._stacks, self._noise, strict=True)]
        weights = self._by_logits([torch.softmax(stack / self._temperature, 1) for stack in noisy])
        for mixture in self._mixtures:
            mixture.use_probs(weights[mixture.logits])

    def _release(self) -> None:
        for mixture in self._mixtures:
            mixture.use_probs(None)

    def _cooled(self, logits: Tensor) -> Tensor:
        return logits if self._gumbel else logits / self._temperature.to(logits.dtype)

    def _by_logits(self, stacks: list[Tensor]) -> dict[nn.Parameter, Tensor]:
        pairs = zip(self._stacks, stacks, strict=True)
        return {p: row for parameters, rows in pairs for p, row in zip(parameters, rows.unbind(), strict=True)}


def check_relaxation(kind: str) -> None:
    """Refuse what is none of `RELAXATIONS`.

    Raises:
        ValueError: It is not.
    """
    if kind not in RELAXATIONS:
        raise ValueError(f"relaxation is {kind!r}; it must be one of {', '.join(map(repr, RELAXATIONS))}")
