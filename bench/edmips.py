"""The step of a search in plain torch: every tensor is quantized K times, the copies are added, then one convolution.

It is what `asga.search` does, written down as the papers have it, eagerly or for torch.compile: the peer of the search
step. What a search also needs is left out, in favor of the peer: floors of scales, guards against NaN and infinities,
schedules, checks of labels, the dot products of the diagnostics.

Source: Cai and Vasconcelos, "Rethinking Differentiable Search for Mixed-Precision Neural Networks" (EdMIPS), CVPR 2020,
eq. 10, where scales are fixed; Esser et al., "Learned Step Size Quantization", ICLR 2020, eq. 1-3, for learned ones.
"""

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from asga.bench.peers import lsq
from asga.nn.layers import QuantizedLayer
from asga.nn.quantizers import Quantizer
from asga.search.dual import DualAscent
from asga.steps import autocast_to

# What the search step of asga has by default, spelled out; see `asga.search.PolicySearcher` and `asga.optim.ASGA`.
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
LOGIT_LR, BETAS, EPS = 0.03, (0.9, 0.99), 1e-8
ALPHA, RHO_MIN, RHO_MAX = 0.1, 0.01, 0.5


def plain_twin(mixed: nn.Module) -> nn.Module:
    """A copy of a calibrated model of `asga.prepare`, with quantizers in plain torch.

    Its parameters have the names and values of the original.
    """
    twin = copy.deepcopy(mixed)
    for layer in twin.modules():
        if isinstance(layer, QuantizedLayer):
            layer.weight_quantizer = PlainQuantizer(layer.weight_quantizer, per_channel=True)
            layer.act_quantizer = PlainQuantizer(layer.act_quantizer, per_channel=False)
    return twin


class PlainQuantizer(nn.Module):
    """LSQ for every candidate, weighted by the softmax of logits where there are several."""

    def __init__(self, quantizer: Quantizer, *, per_channel: bool) -> None:
        super().__init__()
        self._ranges = list(zip(quantizer.quant_mins, quantizer.quant_maxs, strict=True))
        self._per_channel = per_channel
        for name, parameter in quantizer.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))

    def probs(self) -> Tensor:
        """Of the candidates."""
        return torch.softmax(self.logits, dim=0) if hasattr(self, "logits") else self.scale.new_ones(1)

    def forward(self, x: Tensor) -> Tensor:
        """The mixture, computed in float32."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        if not hasattr(self, "logits"):
            return self._quantize(values, self.scale, *self._ranges[0]).to(x.dtype)
        total = None
        for prob, scale, bounds in zip(self.probs().unbind(), self.scales.unbind(), self._ranges, strict=True):
            term = prob * self._quantize(values, scale, *bounds)
            total = term if total is None else total + term
        return total.to(x.dtype)

    def _quantize(self, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        scale = _ScaledGradient.apply(scale, (x.numel() // scale.numel() * high) ** -0.5)
        return lsq(x, scale.reshape(-1, *[1] * (x.dim() - 1)) if self._per_channel else scale, low, high)


class _ScaledGradient(torch.autograd.Function):
    """The same value, and the gradient times a factor. Cheaper than ``(x - x * f).detach() + x * f``, and exact."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class PlainSearch:
    """Steps of a search.

    Args:
        model: Of `plain_twin`.
        tables: Per layer what each pair of candidates costs, as a share of the budget.
        dual: Weighs the cost.
        sharpness_aware: Two passes and the aligned step with an adaptive radius; otherwise one pass and SGD.
        autocast: Of the model, or None.
        compiled: Whether model and optimizers go through torch.compile, in full graphs.
    """

    def __init__(
        self,
        model: nn.Module,
        tables: Mapping[str, Tensor],
        dual: DualAscent,
        *,
        sharpness_aware: bool,
        autocast: torch.dtype | None,
        compiled: bool,
    ) -> None:
        self.model, self._tables, self._dual = model, tables, dual
        self._sharpness_aware, self._autocast = sharpness_aware, autocast
        named = list(model.named_parameters())
        self._logits = [p for name, p in named if name.endswith(".logits")]
        weights = [p for name, p in named if not name.endswith((".logits", ".scale", ".scales"))]
        # In this order: decayed and perturbed, perturbed, neither.
        self._decayed = [p for p in weights if p.dim() > 1]
        self._perturbed = self._decayed + [p for p in weights if p.dim() < 2]
        self._weights = self._perturbed + [p for name, p in named if name.endswith((".scale", ".scales"))]
        self._statistics = [b for b in model.buffers() if b.is_floating_point()]
        self._momentum = [torch.zeros_like(p) for p in self._weights]
        self._moments = [torch.zeros_like(p) for p in self._logits], [torch.zeros_like(p) for p in self._logits]
        self._count = torch.zeros((), device=self._logits[0].device)
        self._rho = torch.full_like(self._count, math.sqrt(RHO_MIN * RHO_MAX))
        run = self._maybe_compile if compiled else lambda function: function
        self._objective, self._expected = run(self._loss), run(self._cost)
        self._ascend, self._descend, self._adam = map(run, (_ascend, _descend, _adam))

    @staticmethod
    def _maybe_compile(function: Callable) -> Callable:
        return torch.compile(function, fullgraph=True, dynamic=False)

    def step(self, inputs: Tensor, labels: Tensor) -> float:
        """Make one; returns the loss before it."""
        loss = self._pass(inputs, labels)
        with torch.no_grad():
            grads = [p.grad for p in self._weights]
            if self._sharpness_aware:
                grads = self._second_pass(inputs, labels, loss, grads)
            self._descend(self._weights, grads, self._momentum, len(self._decayed))
            self._count += 1
            self._adam(self._logits, self._logit_gradients(), *self._moments, self._count)
        return loss.item()

    def _pass(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self.model.zero_grad()
        with torch.enable_grad():
            loss = self._objective(inputs, labels)
            loss.backward()
        return loss.detach()

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        with autocast_to(inputs.device, self._autocast):
            outputs = self.model(inputs)
        return functional.cross_entropy(outputs.float(), labels)

    def _cost(self) -> Tensor:
        """The expected cost, as a share of the budget."""
        cost = 0.0
        for name, table in self._tables.items():
            layer = self.model.get_submodule(name)
            cost = cost + layer.weight_quantizer.probs() @ table @ layer.act_quantizer.probs()
        return cost

    def _logit_gradients(self) -> list[Tensor]:
        """Those of the last pass, and those of the expected cost as the multiplier weighs them."""
        of_loss = [p.grad for p in self._logits]
        with torch.enable_grad():
            cost = self._expected()
            of_cost = list(torch.autograd.grad(cost, self._logits))
        norms = [torch.stack(torch._foreach_norm(grads)).norm() for grads in (of_loss, of_cost)]
        weights = self._dual.step({"bitops": cost.item()}, {"bitops": (norms[0] / norms[1]).item()})
        return torch._foreach_add(of_loss, of_cost, alpha=weights["bitops"])

    def _second_pass(self, inputs: Tensor, labels: Tensor, loss: Tensor, first: list[Tensor]) -> list[Tensor]:
        """Gradients to step with: the mean of both passes."""
        count = len(self._perturbed)
        backups = [p.clone() for p in self._perturbed]
        statistics = [b.clone() for b in self._statistics]
        self._ascend(self._perturbed, first[:count], self._rho)
        second_loss = self._pass(inputs, labels)
        torch._foreach_copy_(self._perturbed, backups)
        torch._foreach_copy_(self._statistics, statistics)
        self._rho = torch.log1p((second_loss - loss).clamp(min=0.0)).clamp(RHO_MIN, RHO_MAX)
        return torch._foreach_mul(torch._foreach_add(first, [p.grad for p in self._weights]), 0.5)


def _ascend(params: list[Tensor], grads: list[Tensor], rho: Tensor) -> None:
    """To higher loss, with the shift that aligns gradients; see `asga.optim.ASGA`."""
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    torch._foreach_add_(params, torch._foreach_mul(grads, (1 - ALPHA) * rho / norm))


def _descend(params: list[Tensor], grads: list[Tensor], momentum: list[Tensor], decayed: int) -> None:
    """SGD with Nesterov momentum; the first parameters are decayed."""
    grads = [*torch._foreach_add(grads[:decayed], params[:decayed], alpha=WEIGHT_DECAY), *grads[decayed:]]
    torch._foreach_mul_(momentum, MOMENTUM)
    torch._foreach_add_(momentum, grads)
    torch._foreach_add_(params, torch._foreach_add(grads, momentum, alpha=MOMENTUM), alpha=-LR)


def _adam(params: list[Tensor], grads: list[Tensor], first: list[Tensor], second: list[Tensor], count: Tensor) -> None:
    """Kingma and Ba, "Adam", ICLR 2015, algorithm 1."""
    beta1, beta2 = BETAS
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    root = torch._foreach_sqrt(torch._foreach_div(second, 1 - beta2**count))
    torch._foreach_add_(root, EPS)
    moves = torch._foreach_div(torch._foreach_div(first, 1 - beta1**count), root)
    torch._foreach_add_(params, moves, alpha=-LOGIT_LR)
