import itertools

import pytest
import torch

from asga import Budget, SearchSpace, prepare
from asga.nn import MixedActQuantizer, MixedWeightQuantizer, QuantizedLayer
from asga.policy import LayerPolicy, Policy
from asga.search.costs import policy_costs
from asga.search.expected import ExpectedCosts
from asga.search.profiles import profile_layers
from asga.search.relaxation import Relaxation


@pytest.fixture(
    params=[SearchSpace(), SearchSpace(weight_bits=(2, 5), act_bits=(3,), exclude=["conv3"], first_last=None)],
    ids=["usual", "with one candidate for inputs, an excluded layer, and no pins"],
)
def setting(request, tiny_net):
    model, space = tiny_net(), request.param
    choices = space.choices(model)
    profiles = profile_layers(model, torch.zeros(1, 1, 8, 8), choices.names)
    mixed = prepare(model, space)
    with torch.no_grad():
        for k, module in enumerate(mixed.modules()):
            if isinstance(module, MixedWeightQuantizer | MixedActQuantizer):
                module.logits.copy_(torch.randn(len(module.bits), generator=torch.Generator().manual_seed(k)))
    return mixed, choices, profiles, Budget(bitops="w4a4", size="w3").limits(profiles, choices)


def quantized_layers(model) -> dict[str, QuantizedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def test_is_the_mean_over_all_policies(setting):
    mixed, choices, profiles, limits = setting
    layers, relaxation = quantized_layers(mixed), Relaxation(mixed, "softmax")
    expected = ExpectedCosts(layers, profiles, choices, limits)(relaxation.probs())
    probs = {logits: values.tolist() for logits, values in relaxation.probs().items()}
    totals = dict.fromkeys(limits, 0.0)

    def of(quantizer, bits):
        return (
            [(b, p) for b, p in zip(bits, probs[quantizer.logits], strict=True)]
            if hasattr(quantizer, "logits")
            else [(bits[0], 1.0)]
        )

    sides = [
        list(itertools.product(of(layers[n].weight_quantizer, c.weight_bits), of(layers[n].act_quantizer, c.act_bits)))
        for n, c in choices.layers.items()
    ]
    for combination in itertools.product(*sides):
        probability = 1.0
        policy = {name: LayerPolicy(None, None) for name in choices.names}
        for name, ((weight_bits, p), (act_bits, q)) in zip(choices.layers, combination, strict=True):
            policy[name] = LayerPolicy(weight_bits, act_bits)
            probability *= p * q
        costs = policy_costs(profiles, Policy(policy))
        for metric, limit in limits.items():
            totals[metric] += probability * getattr(costs, metric) / limit
    assert {metric: cost.item() for metric, cost in expected.items()} == pytest.approx(totals, rel=1e-5)


def test_a_peak_is_the_largest_expectation_of_a_layer(tiny_net):
    model = tiny_net()
    choices = SearchSpace().choices(model)
    profiles = profile_layers(model, torch.zeros(1, 1, 8, 8), choices.names)
    mixed = prepare(model, choices)
    limits = Budget(act_memory="a4", bitops="w4a4").limits(profiles, choices)
    relaxation = Relaxation(mixed, "softmax")
    expected = ExpectedCosts(quantized_layers(mixed), profiles, choices, limits)(relaxation.probs())
    # Uniform probabilities over 2, 3, 4, 6 and 8 bits are 4.6 bits; conv2 reads 4 x 8 x 8 values, conv3 8 x 4 x 4, and
    # the first layer 64 of 8 bits.
    assert expected["act_memory_bits"].item() == pytest.approx(4.6 * 4 * 8 * 8 / limits["act_memory_bits"])
    expected["act_memory_bits"].backward()
    assert mixed.conv2.act_quantizer.logits.grad.any()
    assert not mixed.conv3.act_quantizer.logits.grad.any()


def test_every_choice_has_a_gradient(setting):
    mixed, choices, profiles, limits = setting
    relaxation = Relaxation(mixed, "softmax")
    costs = ExpectedCosts(quantized_layers(mixed), profiles, choices, limits)(relaxation.probs())
    costs["bitops"].backward()
    assert all(logits.grad.any() for logits in relaxation.logits if len(logits) > 1)
