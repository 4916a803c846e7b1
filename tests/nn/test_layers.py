import copy
import math
import os
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from asga.nn import (
    FloatWeightQuantizer,
    MixedConv2d,
    MixedLinear,
    MixedWeightQuantizer,
    QuantConv2d,
    QuantLinear,
    calibrate,
)

BITS = (2, 3, 4, 6, 8)
CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "stride and dilation": {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4},
    "no bias": {"kernel_size": 1, "bias": False},
    "zeros": {"kernel_size": 3, "padding": 1},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}
KINDS = [
    pytest.param(nn.Conv2d, QuantConv2d, 4, id="QuantConv2d"),
    pytest.param(nn.Linear, QuantLinear, 4, id="QuantLinear"),
    pytest.param(nn.Conv2d, MixedConv2d, BITS, id="MixedConv2d"),
    pytest.param(nn.Linear, MixedLinear, BITS, id="MixedLinear"),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(base, **options):
    """A float layer and an input for it."""
    if base is nn.Linear:
        return nn.Linear(12, 6, **options), torch.randn(5, 12)
    return nn.Conv2d(4, 8, **{"kernel_size": 3, "padding": 1, **options}), torch.randn(2, 4, 9, 9)


def signal_to_noise(output, reference):
    return 20 * math.log10(reference.norm().item() / (output - reference).norm().item())


class TestConvolution:
    @pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
    @pytest.mark.parametrize(("cls", "bits"), [(QuantConv2d, 3), (MixedConv2d, BITS)], ids=["quant", "mixed"])
    def test_is_the_float_convolution_of_quantized_tensors(self, cls, bits, options):
        conv = nn.Conv2d(4, 8, **options)
        images = torch.randn(2, 4, 9, 9)
        layer = cls.from_float(conv, weight_bits=bits, act_bits=bits)
        output = layer(images)
        reference = copy.deepcopy(conv)
        with torch.no_grad():
            reference.weight.copy_(layer.weight_quantizer(conv.weight))
        assert torch.equal(output, reference(layer.act_quantizer(images)))

    @pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
    def test_without_bits_it_is_the_float_convolution(self, options):
        conv = nn.Conv2d(4, 8, **options)
        images = torch.randn(2, 4, 9, 9)
        layer = QuantConv2d.from_float(conv, weight_bits=None, act_bits=None)
        assert torch.equal(layer.eval()(images), conv(images))

    @pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
    def test_eight_bits_are_close_to_float(self, options):
        conv = nn.Conv2d(4, 8, **options)
        images = torch.randn(8, 4, 9, 9)
        layer = QuantConv2d.from_float(conv, weight_bits=8, act_bits=8)
        # On the best grid of 256 values normal inputs have 40.6 dB, uniform weights 48 dB, together 39.9 dB;
        # 37 dB allows for twice that noise.
        assert signal_to_noise(layer(images), conv(images)) > 37


class TestLinear:
    def test_is_the_float_product_of_quantized_tensors(self):
        linear, inputs = make(nn.Linear)
        layer = QuantLinear.from_float(linear, weight_bits=3, act_bits=4)
        output = layer(inputs)
        expected = F.linear(layer.act_quantizer(inputs), layer.weight_quantizer(linear.weight), linear.bias)
        assert torch.equal(output, expected)

    def test_inputs_of_more_dimensions(self):
        layer = QuantLinear(12, 6, weight_bits=4, act_bits=4)
        assert layer(torch.randn(2, 3, 12)).shape == (2, 3, 6)

    def test_weight_only_and_input_only(self):
        linear, inputs = make(nn.Linear)
        weight_only = QuantLinear.from_float(linear, weight_bits=3, act_bits=None).eval()
        expected = F.linear(inputs, weight_only.weight_quantizer(linear.weight), linear.bias)
        assert torch.equal(weight_only(inputs), expected)
        input_only = QuantLinear.from_float(linear, weight_bits=None, act_bits=3)
        input_only(inputs)
        expected = F.linear(input_only.act_quantizer(inputs), linear.weight, linear.bias)
        assert torch.equal(input_only(inputs), expected)

    def test_eight_bits_are_close_to_float(self):
        linear, inputs = nn.Linear(256, 64), torch.randn(64, 256)
        layer = QuantLinear.from_float(linear, weight_bits=8, act_bits=8)
        assert signal_to_noise(layer(inputs), linear(inputs)) > 37  # as for convolutions


@pytest.mark.parametrize(("base", "cls", "bits"), KINDS)
class TestFromFloat:
    def test_parameters_are_the_same_objects_and_names_stay(self, base, cls, bits):
        module, _ = make(base)
        layer = cls.from_float(module, weight_bits=bits, act_bits=bits)
        assert layer.weight is module.weight
        assert layer.bias is module.bias
        assert list(layer.state_dict())[:2] == ["weight", "bias"]
        assert [name for name in layer.state_dict() if not name.startswith(("weight_q", "act_q"))] == [
            "weight",
            "bias",
        ]

    def test_the_float_layer_is_left_as_it_was(self, base, cls, bits):
        module, inputs = make(base)
        expected = module(inputs)
        layer = cls.from_float(module, weight_bits=bits, act_bits=bits)
        layer.eval()
        assert type(module) is base
        assert list(module.state_dict()) == ["weight", "bias"]
        assert module.training
        assert torch.equal(module(inputs), expected)

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_mode_dtype_and_requires_grad_are_kept(self, base, cls, bits, training):
        module, _ = make(base, dtype=torch.bfloat16)
        module.train(training)
        module.weight.requires_grad_(False)
        layer = cls.from_float(module, weight_bits=bits, act_bits=bits)
        assert [m.training for m in layer.modules()] == [training] * 3
        assert layer.weight.dtype == torch.bfloat16
        assert not layer.weight.requires_grad
        assert layer.weight_quantizer.scale_parameter.dtype == torch.float32

    def test_bfloat16_input_gives_bfloat16_output(self, base, cls, bits):
        module, inputs = make(base, dtype=torch.bfloat16)
        layer = cls.from_float(module, weight_bits=bits, act_bits=bits)
        assert layer(inputs.bfloat16()).dtype == torch.bfloat16

    def test_meta_device(self, base, cls, bits):
        module, inputs = make(base, device="meta")
        layer = cls.from_float(module, weight_bits=bits, act_bits=None)
        assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
        assert layer(inputs.to("meta")).shape[0] == inputs.shape[0]

    def test_hooks_run_and_their_handles_still_remove_them(self, base, cls, bits):
        module, inputs = make(base)
        calls = []
        handle = module.register_forward_hook(lambda module, args, output: calls.append(type(module)))
        layer = cls.from_float(module, weight_bits=bits, act_bits=bits)
        layer(inputs)
        handle.remove()
        layer(inputs)
        assert calls == [cls]

    def test_other_types_are_refused(self, base, cls, bits):
        module, _ = make(base)
        layer = cls.from_float(module, weight_bits=bits, act_bits=bits)
        for wrong in (nn.Conv1d(2, 2, 1), layer):
            with pytest.raises(TypeError, match=f"module is a .*; a float {base.__name__} is needed"):
                cls.from_float(wrong, weight_bits=bits, act_bits=bits)


@pytest.mark.parametrize(("base", "cls", "bits"), KINDS)
class TestUse:
    def test_all_parameters_get_finite_gradients(self, base, cls, bits):
        module, inputs = make(base)
        layer = cls.from_float(module, weight_bits=bits, act_bits=bits)
        inputs.requires_grad_()
        layer(inputs).square().sum().backward()
        for tensor in (inputs, *layer.parameters()):
            assert torch.isfinite(tensor.grad).all()
            assert tensor.grad.abs().sum() > 0

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiles_to_one_graph_with_the_same_values_and_gradients(self, base, cls, bits, backend):
        module, inputs = make(base)
        layer = cls.from_float(module, weight_bits=bits, act_bits=bits)
        calibrate(layer, [inputs])
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        for batch in (inputs, torch.cat([inputs, inputs])):  # the second size makes the shape dynamic
            results = []
            for run in (layer, compiled):
                layer.zero_grad()
                output = run(batch)
                output.square().sum().backward()
                results.append([output, *(p.grad for p in layer.parameters())])
            torch.testing.assert_close(*results)

    def test_autocast(self, base, cls, bits):
        module, inputs = make(base)
        layer = cls.from_float(module, weight_bits=bits, act_bits=bits)
        calibrate(layer, [inputs])
        expected = layer(inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(inputs)
        output.float().square().sum().backward()
        assert output.dtype == torch.bfloat16
        assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
        # Weight, input and output are rounded to 8 significant bits, at most 2**-9 relative error each.
        assert (output - expected).norm() < 3 * 2**-9 * expected.norm()

    def test_state_round_trip(self, base, cls, bits, tmp_path):
        module, inputs = make(base)
        layer = cls.from_float(module, weight_bits=bits, act_bits=bits)
        calibrate(layer, [inputs.relu()])
        torch.save(layer.state_dict(), tmp_path / "state.pt")
        other = cls.from_float(make(base)[0], weight_bits=bits, act_bits=bits)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(other.eval()(inputs), layer.eval()(inputs))

    def test_deepcopy_computes_the_same(self, base, cls, bits):
        module, inputs = make(base)
        layer = cls.from_float(module, weight_bits=bits, act_bits=bits)
        calibrate(layer, [inputs])
        assert torch.equal(copy.deepcopy(layer)(inputs), layer(inputs))

    @pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
    def test_checkpoints_compute_the_same(self, base, cls, bits, reentrant):
        layer, x = make(base)
        quantized = cls.from_float(layer, weight_bits=bits, act_bits=bits)
        calibrate(quantized, [x])
        results = []
        for run in (quantized, lambda x: checkpoint(quantized, x, use_reentrant=reentrant)):
            quantized.zero_grad()
            leaf = x.clone().requires_grad_()
            output = run(leaf)
            output.square().sum().backward()
            results.append([output, leaf.grad, *(p.grad.clone() for p in quantized.parameters())])
        assert all(map(torch.equal, *results))

    def test_gradients_per_sample(self, base, cls, bits):
        layer, x = make(base)
        quantized = cls.from_float(layer, weight_bits=bits, act_bits=None)
        parameters = {name: parameter.detach() for name, parameter in quantized.named_parameters()}

        def loss(parameters, x):
            return torch.func.functional_call(quantized, parameters, (x[None],)).square().sum()

        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        quantized(x).square().sum().backward()
        for name, parameter in quantized.named_parameters():
            torch.testing.assert_close(found[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-4)

    def test_a_pickled_layer_computes_the_same(self, base, cls, bits):
        layer, x = make(base)
        quantized = cls.from_float(layer, weight_bits=bits, act_bits=bits)
        calibrate(quantized, [x])
        assert torch.equal(pickle.loads(pickle.dumps(quantized))(x), quantized(x))

    def test_export_before_calibration_says_so(self, base, cls, bits):
        layer, x = make(base)
        quantized = cls.from_float(layer, weight_bits=bits, act_bits=bits)
        with pytest.raises(RuntimeError, match="an activation quantizer that is not calibrated"):
            torch.export.export(quantized, (x,))

    def test_repr_shows_the_bits(self, base, cls, bits):
        layer = cls.from_float(make(base)[0], weight_bits=bits, act_bits=None)
        assert f"weight_bits={bits}, act_bits=None" in repr(layer)
        assert (layer.weight_bits, layer.act_bits) == (bits, None)


@pytest.mark.parametrize(
    ("base", "cls", "bits", "act_bits"),
    [
        (nn.Linear, QuantLinear, "fp4", 8),
        (nn.Conv2d, QuantConv2d, "fp8", None),
        (nn.Linear, MixedLinear, (2, "fp4", 4, "fp8"), (4, 8)),
        (nn.Conv2d, MixedConv2d, ("fp4", "fp8"), (4, 8)),
    ],
    ids=["QuantLinear", "QuantConv2d", "MixedLinear", "MixedConv2d"],
)
class TestSmallFloats:
    """Weights in small floats, in the same layers as integers."""

    def layer(self, base, cls, bits, act_bits):
        module, inputs = make(base)
        layer = cls.from_float(module, weight_bits=bits, act_bits=act_bits)
        calibrate(layer, [inputs])
        return module, inputs, layer

    def test_the_weight_is_that_of_the_quantizer(self, base, cls, bits, act_bits):
        module, inputs, layer = self.layer(base, cls, bits, act_bits)
        assert (layer.weight_bits, layer.act_bits) == (bits, act_bits)
        assert f"weight_bits={bits}" in repr(layer)
        quantizer = FloatWeightQuantizer if cls._quantizers[0] is not MixedWeightQuantizer else MixedWeightQuantizer
        reference = copy.deepcopy(module)
        with torch.no_grad():
            reference.weight.copy_(quantizer(module.weight, bits)(module.weight))
        torch.testing.assert_close(layer(inputs), reference(layer.act_quantizer(inputs)))

    def test_all_parameters_get_finite_gradients(self, base, cls, bits, act_bits):
        _, inputs, layer = self.layer(base, cls, bits, act_bits)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(inputs).float().square().sum().backward()
        for parameter in (p for p in layer.parameters() if p.requires_grad):
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().sum() > 0

    def test_state_round_trip(self, base, cls, bits, act_bits):
        _, inputs, layer = self.layer(base, cls, bits, act_bits)
        other = cls.from_float(make(base)[0], weight_bits=bits, act_bits=act_bits)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.eval()(inputs), layer.eval()(inputs))

    def test_on_the_meta_device(self, base, cls, bits, act_bits):
        layer = cls.from_float(make(base, device="meta")[0], weight_bits=bits, act_bits=None)
        assert layer(make(base)[1].to("meta")).device.type == "meta"


def test_int4_is_4():
    assert QuantLinear(12, 6, weight_bits="int4", act_bits=None).weight_bits == 4


@pytest.mark.parametrize(("cls", "bits"), [(QuantConv2d, 4), (MixedConv2d, BITS)], ids=["quant", "mixed"])
def test_channels_last_is_kept(cls, bits):
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    images = torch.randn(2, 4, 9, 9).to(memory_format=torch.channels_last)
    layer = cls.from_float(conv, weight_bits=bits, act_bits=bits)
    output = layer(images)
    for tensor in (layer.weight, layer.weight_quantizer(layer.weight), layer.act_quantizer(images), output):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, cls.from_float(conv, weight_bits=bits, act_bits=bits)(images.contiguous()))


def test_a_mixture_is_the_layer_of_the_mixed_tensors():
    conv, images = make(nn.Conv2d)
    mixed = MixedConv2d.from_float(conv, weight_bits=(2, 4), act_bits=(3, 8))
    output = mixed(images)
    fixed = [QuantConv2d.from_float(conv, weight_bits=w, act_bits=a) for w in (2, 4) for a in (3, 8)]
    # Convolution is bilinear: the layer of two mixtures is the mixture of the four fixed layers.
    torch.testing.assert_close(output, sum(layer(images) for layer in fixed) / 4, rtol=1e-5, atol=1e-5)


def test_layers_can_be_made_without_a_float_one():
    conv = QuantConv2d(4, 8, 3, groups=2, bias=False, weight_bits=2, act_bits=4, init="lsq")
    assert conv.bias is None
    assert conv.weight_quantizer.scale.shape == (8,)
    scale = 2 * conv.weight.detach().abs().mean((1, 2, 3)) / math.sqrt(1)
    torch.testing.assert_close(conv.weight_quantizer.scale.detach(), scale)


def test_bits_of_a_layer_are_checked():
    linear = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="bits is 'fp6'"):
        QuantLinear.from_float(linear, weight_bits="fp6", act_bits=4)
    with pytest.raises(ValueError, match="bits is 9"):
        QuantLinear.from_float(linear, weight_bits=9, act_bits=4)
    with pytest.raises(ValueError, match=r"bits\[1\] is 1"):
        MixedLinear.from_float(linear, weight_bits=(2, 4), act_bits=(2, 1))


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_inductor_gives_the_values_and_gradients_of_eager(autocast):
    # One network for all layers, fixed and mixed: inductor takes tens of seconds.
    net = nn.Sequential(
        QuantConv2d(3, 4, 3, weight_bits=4, act_bits=4),
        MixedConv2d(4, 4, 2, weight_bits=(2, 4, 8), act_bits=(3, 8)),
        nn.Flatten(),
        QuantLinear(16, 8, weight_bits="fp4", act_bits=8),
        MixedLinear(8, 8, weight_bits=(2, "fp8"), act_bits=(2, 8)),  # the fp8 of a last layer once got a wrong gradient
    )
    inputs = torch.randn(5, 3, 5, 5, requires_grad=True)
    calibrate(net, [inputs.detach()])
    torch._dynamo.reset()
    results = []
    for run in (net, torch.compile(net, fullgraph=True, dynamic=False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = run(inputs)
        assert output.dtype == (torch.bfloat16 if autocast else torch.float32)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), [inputs, *net.parameters()])])
    if not autocast:
        torch.testing.assert_close(*results)
    for eager, compiled in zip(*results, strict=True):
        # Eager rounds the sums of the biases' gradients to 8 significant bits on the way, inductor once at the end.
        assert (compiled - eager).norm() <= 2**-8 * eager.norm()


@pytest.mark.parametrize(
    "build",
    [
        lambda: QuantLinear(8, 4, weight_bits=4, act_bits=8),
        lambda: QuantLinear(8, 4, weight_bits="fp4", act_bits=4),
        lambda: MixedLinear(8, 4, weight_bits=("fp8", 2, "fp4", 4), act_bits=(2, 8)),
    ],
    ids=["fixed", "fp4", "mixed"],
)
def test_a_layer_made_on_meta_and_loaded_is_the_one_that_was_saved(build):
    """As large models are made. A wrong LSQ factor, which no state dict has, would not show in the output."""
    layer, inputs = build(), torch.randn(5, 8)
    layer(inputs)
    with torch.device("meta"):
        other = build()
    other.to_empty(device="cpu").load_state_dict(layer.state_dict())
    results = []
    for one in (layer, other):
        output = one(inputs)
        results.append([output, *torch.autograd.grad(output.square().sum(), list(one.parameters()))])
    assert all(map(torch.equal, *results))
