import math

import pytest
from torch.nn import functional

from asga import SearchSpace
from asga.search import gradient_sensitivity, hessian_sensitivity, measured_sensitivity
from asga.steps import TrainingError

SPACE = SearchSpace(weight_bits=(2, 8), act_bits=(2, 4))


@pytest.mark.parametrize("sensitivity", [gradient_sensitivity, hessian_sensitivity, measured_sensitivity])
def test_a_loss_that_is_not_finite_names_its_batch(tiny_net, labeled_batches, sensitivity):
    batches = labeled_batches(3)

    def loss_fn(logits, labels):
        return functional.cross_entropy(logits, labels) * (math.inf if labels.equal(batches[1][1]) else 1.0)

    with pytest.raises(TrainingError, match="the loss of the float model is inf on batch 2 of those that"):
        sensitivity(tiny_net(), SPACE, batches, loss_fn=loss_fn)


@pytest.mark.parametrize("sensitivity", [gradient_sensitivity, hessian_sensitivity])
def test_a_gradient_that_is_not_finite_names_a_layer(tiny_net, labeled_batches, sensitivity):
    """The square root at zero."""

    def loss_fn(logits, labels):
        return (logits - logits.detach()).abs().sum().sqrt() + 1

    with pytest.raises(TrainingError, match="the sensitivity of layer 'conv2' is not finite, while the loss is"):
        sensitivity(tiny_net(), SPACE, labeled_batches(1), loss_fn=loss_fn)
