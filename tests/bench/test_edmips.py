"""The peer of the search step: its parts are what they are the peers of."""

import pytest
import torch
from torch import nn

from asga.bench import edmips
from asga.bench.edmips import PlainQuantizer
from asga.nn.quantizers import ActQuantizer, MixedActQuantizer, MixedWeightQuantizer, WeightQuantizer

BITS = (2, 4, 8)


def _quantizer(kind: str, x: torch.Tensor) -> nn.Module:
    if kind.startswith("weight"):
        return WeightQuantizer(x, 4) if kind == "weight" else MixedWeightQuantizer(x, BITS)
    quantizer = ActQuantizer(4) if kind == "act" else MixedActQuantizer(BITS)
    quantizer(x)  # the first batch sets its scale
    return quantizer


@pytest.mark.parametrize("kind", ["weight", "act", "weight mixture", "act mixture"])
def test_a_quantizer_equals_that_of_asga(kind):
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    quantizer = _quantizer(kind, x.detach())
    with torch.no_grad():
        # The largest value is exactly on the boundary of the range otherwise.
        quantizer.scale_parameter.mul_(0.97)
    plain = PlainQuantizer(quantizer, per_channel=kind.startswith("weight"))
    assert dict(plain.named_parameters()).keys() == dict(quantizer.named_parameters()).keys()
    found = []
    for module in (quantizer, plain):
        output = module(x)
        found.append((output, *torch.autograd.grad(output, [x, *module.parameters()], x.detach().sign() + 0.5)))
    for ours, theirs in zip(*found, strict=True):
        # Scales, probabilities and their gradients are float32.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class TestOptimizers:
    """Several steps, with gradients that change."""

    @pytest.fixture
    def params(self) -> list[torch.Tensor]:
        return [torch.ones(3, 2), torch.ones(2)]

    def test_sgd(self, params):
        groups = [{"params": [nn.Parameter(params[0].clone())], "weight_decay": edmips.WEIGHT_DECAY}]
        groups.append({"params": [nn.Parameter(params[1].clone())]})
        expected = torch.optim.SGD(groups, lr=edmips.LR, momentum=edmips.MOMENTUM, nesterov=True)
        momentum = [torch.zeros_like(p) for p in params]
        self._compare(params, expected, lambda grads, _: edmips._descend(params, grads, momentum, 1))

    def test_adam(self, params):
        copies = [nn.Parameter(p.clone()) for p in params]
        expected = torch.optim.Adam(copies, lr=edmips.LOGIT_LR, betas=edmips.BETAS, eps=edmips.EPS)
        first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
        self._compare(params, expected, lambda grads, count: edmips._adam(params, grads, first, second, count))

    @staticmethod
    def _compare(params, expected, step):
        copies = [p for group in expected.param_groups for p in group["params"]]
        for count in range(1, 5):
            grads = [torch.full_like(p, 0.3 * count - 1) for p in params]
            for copy, grad in zip(copies, grads, strict=True):
                copy.grad = grad.clone()
            expected.step()
            step(grads, torch.tensor(float(count)))
        for ours, theirs in zip(params, copies, strict=True):
            torch.testing.assert_close(ours, theirs.detach())
