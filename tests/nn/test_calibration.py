import warnings

import pytest
import torch
from torch import nn

from asga.nn import ActQuantizer, QuantConv2d, QuantLinear, calibrate


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        QuantConv2d(3, 4, 3, weight_bits=2, act_bits=4, init="lsq"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        QuantLinear(4 * 6 * 6, 5, weight_bits=2, act_bits=4, init="lsq"),
    )


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3)]


def scales(model):
    return [m.scale.detach().clone() for m in model.modules() if isinstance(m, ActQuantizer)]


def test_scales_come_from_the_activations_of_the_float_network(model, batches):
    calibrate(model, batches)
    images = torch.cat(batches)
    conv = nn.functional.conv2d(images, model[0].weight, model[0].bias)
    hidden = torch.relu(conv / (1 + model[1].eps) ** 0.5)  # initial running statistics: mean 0, variance 1
    expected = [2 * images.abs().mean() / 7**0.5, 2 * hidden.mean() / 15**0.5]
    torch.testing.assert_close(scales(model), [e.detach().reshape(1) for e in expected])
    assert model[0].act_quantizer.signed
    assert not model[5].act_quantizer.signed


def test_mode_and_running_statistics_are_left_alone(model, batches):
    model.train()
    model[1].eval()
    model[5].act_quantizer.eval()
    before = {name: module.training for name, module in model.named_modules()}
    calibrate(model, batches)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    assert model[1].num_batches_tracked == 0


def test_quantizers_are_active_afterwards(model, batches):
    model.eval()
    calibrate(model, batches)
    floated = nn.functional.conv2d(batches[0], model[0].weight, model[0].bias)
    assert not torch.allclose(model[0](batches[0]), floated)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, torch.zeros(4)),
        lambda x: [x],
        lambda x: {"input": x},
        lambda x: {"input": x, "labels": torch.zeros(4)},
        lambda x: ((x,), torch.zeros(4)),
        lambda x: ({"input": x}, torch.zeros(4)),
    ],
    ids=["inputs and labels", "list", "mapping", "mapping with labels", "tuple of inputs", "mapping of inputs"],
)
def test_kinds_of_batches(model, batches, wrap):
    calibrate(model, batches)
    expected = scales(model)
    calibrate(model, (wrap(batch) for batch in batches))
    assert scales(model) == expected


def test_a_compiled_model_is_calibrated_eagerly(model, batches):
    calibrate(model, batches)
    expected = scales(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    calibrate(compiled, batches)
    assert scales(model) == expected


def test_what_is_set_already_can_be_left(model, batches):
    calibrate(model, batches)
    with torch.no_grad():
        model[0].act_quantizer.scale.fill_(3)
    model[5].act_quantizer = ActQuantizer(4, init="lsq")
    calibrate(model, batches, again=False)
    assert model[0].act_quantizer.scale == 3
    assert model[5].act_quantizer.calibrated
    calibrate(model, iter(()), again=False)  # nothing is left to set
    calibrate(model, batches)
    assert model[0].act_quantizer.scale != 3


def test_no_batch_is_an_error(model):
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(model, [])


@pytest.mark.parametrize("batch", ["image", (), 3], ids=repr)
def test_unknown_kind_of_batch_is_an_error(model, batch):
    with pytest.raises(TypeError, match="without inputs; a tensor, a non-empty tuple or list"):
        calibrate(model, [batch])


def test_a_failure_leaves_the_model_as_it_was(model, batches):
    model.train()
    calibrate(model, batches)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = batches[0].clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"0\.act_quantizer: the activations observed are not finite"):
        calibrate(model, [batches[1], bad])
    with pytest.raises(RuntimeError):
        calibrate(model, [batches[1], torch.zeros(4, 7, 8, 8)])
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        assert not torch.equal(model[0].act_quantizer(batches[0]), batches[0])  # no longer observing


def test_layers_that_no_batch_reached_are_named(batches):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = QuantConv2d(3, 4, 3, weight_bits=4, act_bits=4)
            self.auxiliary = QuantConv2d(3, 4, 3, weight_bits=4, act_bits=4)

        def forward(self, x):
            return self.main(x)

    model = Auxiliary()
    with pytest.warns(UserWarning, match=r"no calibration batch reached 'auxiliary\.act_quantizer'"):
        calibrate(model, batches)
    assert model.main.act_quantizer.calibrated
    assert not model.auxiliary.act_quantizer.calibrated


def test_a_model_without_activation_quantizers_needs_no_batch():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(QuantLinear(3, 2, weight_bits=4, act_bits=None), [])
