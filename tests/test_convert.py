import copy

import pytest
import torch
from torch import nn

from asga.convert import LayerSummary, check_policy, prepare, quantization_summary, quantize
from asga.nn import MixedConv2d, MixedLinear, QuantConv2d, QuantizedLayer, QuantLinear, calibrate, logits
from asga.policy import LayerPolicy, Policy
from asga.search.groups import SIDES, Group
from asga.search.space import SearchSpace


class Net(nn.Module):
    """Two tied linear layers, one convolution used under two names, and layers that cannot be quantized."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.again = self.block[0]
        self.mix = nn.Conv1d(4, 4, 1)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.again(self.block(self.stem(x))).mean(3)
        return self.head(self.second(self.first(self.mix(x).mean(2))))


NAMES = ["stem", "block.0", "first", "second", "head"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images():
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def policy(**changes):
    bits = dict.fromkeys(NAMES, LayerPolicy(4, 4)) | {n.replace("_", "."): b for n, b in changes.items()}
    return Policy(bits)


def same_state(model, state):
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[name], value) for name, value in state.items())


def test_a_policy_with_a_second_name(model):
    layers = {"again" if name == "block.0" else name: bits for name, bits in policy().items()}
    with pytest.raises(ValueError, match=r"'again': the same layer as 'block.0': use that name"):
        check_policy(model, Policy(layers))


class TestQuantize:
    def test_layers_get_the_bits_of_the_policy(self, model):
        converted = quantize(model, policy(stem=LayerPolicy(8, 8), first=LayerPolicy(2, None)))
        layers = {name: m for name, m in converted.named_modules() if isinstance(m, QuantizedLayer)}
        assert {name: (m.weight_bits, m.act_bits) for name, m in layers.items()} == {
            "stem": (8, 8),
            "block.0": (4, 4),
            "first": (2, None),
            "second": (4, 4),
            "head": (4, 4),
        }
        assert type(converted.stem) is QuantConv2d
        assert type(converted.head) is QuantLinear
        assert type(converted.mix) is nn.Conv1d

    def test_float_in_both_leaves_the_layer_alone(self, model):
        converted = quantize(model, policy(head=LayerPolicy(None, None)))
        assert type(converted.head) is nn.Linear

    def test_by_default_the_model_is_left_alone(self, model, images):
        state = copy.deepcopy(model.state_dict())
        converted = quantize(model, policy())
        calibrate(converted, [images])
        with torch.no_grad():
            for parameter in converted.parameters():
                parameter.add_(1.0)
        assert same_state(model, state)
        assert not any(isinstance(m, QuantizedLayer) for m in model.modules())

    def test_in_place_keeps_the_parameters(self, model, images):
        before = dict(model.named_parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert quantize(model, policy(), inplace=True) is model
        assert all(dict(model.named_parameters())[name] is p for name, p in before.items())
        weight = model.head.weight.detach().clone()
        model(images).sum().backward()
        optimizer.step()
        assert not torch.equal(model.head.weight, weight)

    @pytest.mark.parametrize("inplace", [True, False], ids=["in place", "copy"])
    def test_shared_modules_and_tied_weights_stay_so(self, model, inplace):
        converted = quantize(model, policy(), inplace=inplace)
        assert converted.again is converted.block[0]
        assert isinstance(converted.again, QuantConv2d)
        assert converted.second.weight is converted.first.weight
        assert converted.second is not converted.first

    def test_tied_weights_of_the_same_bits_are_quantized_alike(self, model):
        alike, apart = (quantize(model, policy(second=LayerPolicy(bits, 8))) for bits in (4, 3))
        assert alike.first.weight_bits == apart.first.weight_bits == 4
        assert alike.second.weight_quantizer is alike.first.weight_quantizer
        assert alike.second.act_quantizer is not alike.first.act_quantizer
        assert apart.second.weight_quantizer is not apart.first.weight_quantizer

    def test_names_of_the_original_state_are_kept(self, model):
        converted = quantize(model, policy())
        added = [n for n in converted.state_dict() if "_quantizer." not in n]
        assert added == list(model.state_dict())

    def test_a_float_checkpoint_can_be_loaded(self, model):
        converted = quantize(Net(), policy())
        result = converted.load_state_dict(model.state_dict(), strict=False)
        assert result.unexpected_keys == []
        assert all("_quantizer." in name for name in result.missing_keys)

    def test_eight_bits_are_close_to_float(self, model, images):
        model.eval()
        converted = quantize(model, Policy(dict.fromkeys(NAMES, LayerPolicy(8, 8))))
        calibrate(converted, [images])
        noise = (converted(images) - model(images)).norm() / model(images).norm()
        # Five quantized layers in a row, each with 37 dB or better (1.4 %): 7 % if all errors agree.
        assert noise < 0.07

    def test_another_head_takes_the_same_policy(self, model, images):
        model.head = nn.Linear(4, 20)
        converted = quantize(model, policy())
        assert converted(images).shape == (8, 20)

    @pytest.mark.parametrize("inplace", [True, False], ids=["in place", "copy"])
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Policy({"steam": LayerPolicy(4, 4)}), "another architecture"),
            (lambda: policy(steem=LayerPolicy(4, 4)), "did you mean 'stem'"),
            (lambda: Policy({n: LayerPolicy(4, 4) for n in NAMES[:-1]}), "does not mention: 'head'"),
            (lambda: policy(mix=LayerPolicy(4, 4)), "not in the model"),
        ],
        ids=["other architecture", "unknown layer", "missing layer", "skipped layer"],
    )
    def test_a_policy_that_does_not_fit_changes_nothing(self, model, inplace, make, message):
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            quantize(model, make(), inplace=inplace)
        assert same_state(model, state)

    def test_an_error_while_layers_are_made_changes_nothing(self, model):
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="init is 'best'"):
            quantize(model, policy(), inplace=True, init="best")
        assert same_state(model, state)

    @pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(3, 2, 1)], ids=["Linear", "Conv2d"])
    def test_a_model_that_is_one_layer(self, layer):
        only = Policy({"": LayerPolicy(4, 4)})
        assert isinstance(quantize(layer, only), QuantizedLayer)
        with pytest.raises(ValueError, match="the model is itself a"):
            quantize(layer, only, inplace=True)

    def test_channels_last_is_kept(self, model):
        converted = quantize(model.to(memory_format=torch.channels_last), policy())
        assert converted.stem.weight.is_contiguous(memory_format=torch.channels_last)

    def test_mode_is_kept(self, model):
        model.eval()
        assert not any(m.training for m in quantize(model, policy()).modules())

    def test_compiles_to_one_graph(self, model, images):
        converted = quantize(model.eval(), policy())
        calibrate(converted, [images])
        torch._dynamo.reset()
        compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), converted(images))


class TestTarget:
    INT8 = policy(**dict.fromkeys(("stem", "block_0", "first", "second", "head"), LayerPolicy(8, 8)))

    def test_what_it_cannot_run_is_refused_and_changes_nothing(self, model):
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"Conv2d: int4 x int4, for 'stem', 'block\.0'\n  Linear: int4 x int4"):
            quantize(model, policy(), target="onnxruntime-cpu", inplace=True)
        assert same_state(model, state)

    def test_by_default_it_is_that_of_the_search(self, model):
        searched = Policy(policy(), {"deployment_target": "tensorrt"})
        assert check_policy(model, Policy(self.INT8, searched.meta)) == "tensorrt"
        with pytest.raises(ValueError, match="tensorrt cannot run"):
            quantize(model, searched)
        assert quantize(model, searched, target="any").stem.weight_bits == 4

    @pytest.mark.parametrize(("target", "signed"), [("tensorrt", True), ("onnxruntime-cpu", False), ("any", False)])
    def test_inputs_are_signed_where_it_has_no_unsigned_integers(self, model, images, target, signed):
        space = SearchSpace(weight_bits=(8,), act_bits=(8,), target=target)
        for converted in (quantize(model, self.INT8, target=target), prepare(model, space)):
            calibrate(converted, [images.relu()])
            assert bool(converted.stem.act_quantizer.signed) is signed

    def test_small_floats(self, model, images):
        converted = quantize(model, policy(first=LayerPolicy("fp4", None), second=LayerPolicy("fp8", 8)))
        calibrate(converted, [images])
        assert [m.weight_bits for m in (converted.first, converted.second)] == ["fp4", "fp8"]
        row = quantization_summary(converted)[3]
        assert (row.name, row.weight_bits, row.act_bits) == ("first", "fp4", None)
        assert torch.isfinite(converted(images)).all()


class TestPrepare:
    SPACE = SearchSpace(weight_bits=(2, 4), act_bits=(2, 4, 8), pinned={"second": (3, 5)}, exclude=("first",))

    def test_searched_pinned_and_excluded_layers(self, model):
        converted = prepare(model, self.SPACE)
        assert type(converted.stem) is QuantConv2d  # first and last layer: 8 bits
        assert (converted.stem.weight_bits, converted.stem.act_bits) == (8, 8)
        assert type(converted.block[0]) is MixedConv2d
        assert (converted.block[0].weight_bits, converted.block[0].act_bits) == ((2, 4), (2, 4, 8))
        assert converted.again is converted.block[0]
        assert type(converted.first) is nn.Linear
        assert type(converted.second) is QuantLinear
        assert (converted.second.weight_bits, converted.second.act_bits) == (3, 5)
        assert converted.second.weight is converted.first.weight

    def test_linear_layers_are_searched(self, model):
        converted = prepare(model, SearchSpace(first_last=None))
        assert type(converted.head) is MixedLinear

    def test_a_space_that_was_applied_already(self, model):
        converted = prepare(model, self.SPACE.choices(model))
        assert converted.block[0].act_bits == (2, 4, 8)
        assert type(converted.first) is nn.Linear

    def test_groups_share_their_logits(self, model, images):
        space = SearchSpace(first_last=None, groups=[Group(["stem", "block.0"], "act"), ["first", "second"]])
        converted = prepare(model, space)
        layers = {name: converted.get_submodule(name) for name in NAMES}
        of = {
            (name, side): getattr(layer, f"{side}_quantizer").logits for name, layer in layers.items() for side in SIDES
        }
        assert of["stem", "act"] is of["block.0", "act"]
        assert of["first", "act"] is of["second", "act"]
        assert of["first", "weight"] is of["second", "weight"]
        assert len(set(of.values())) == len(logits(converted)) == 2 * len(NAMES) - 3
        # The gradient is that of all layers, and copies and state dicts keep what is shared.
        calibrate(converted, [images])
        converted(images).square().sum().backward()
        copied = copy.deepcopy(converted)
        assert copied.stem.act_quantizer.logits is copied.block[0].act_quantizer.logits
        with torch.no_grad():
            of["stem", "act"].copy_(torch.arange(5.0))
        copied.load_state_dict(converted.state_dict())
        assert torch.equal(copied.block[0].act_quantizer.logits, torch.arange(5.0))

    def test_forward_and_backward(self, model, images):
        converted = prepare(model, self.SPACE)
        calibrate(converted, [images])
        converted(images).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in converted.parameters())

    def test_in_place_keeps_the_parameters(self, model):
        before = dict(model.named_parameters())
        assert prepare(model, self.SPACE, inplace=True) is model
        assert all(dict(model.named_parameters())[name] is p for name, p in before.items())

    def test_nothing_to_search_is_an_error_and_changes_nothing(self, model):
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="no layer is left to search"):
            prepare(model, SearchSpace(exclude=("*",)), inplace=True)
        assert same_state(model, state)


@pytest.mark.parametrize(
    "convert",
    [lambda m: quantize(m, policy()), lambda m: prepare(m, SearchSpace())],
    ids=["quantize", "prepare"],
)
def test_a_converted_model_is_refused(model, convert):
    converted = convert(model)
    for again in (lambda: quantize(converted, policy()), lambda: prepare(converted, SearchSpace())):
        with pytest.raises(ValueError, match="converted already \\(layer 'stem'\\): start from the float model"):
            again()


class TestSummary:
    def test_of_a_prepared_model(self, model):
        rows = quantization_summary(prepare(model, TestPrepare.SPACE))
        assert rows == [
            LayerSummary("stem", "QuantConv2d", 8, 8, ""),
            LayerSummary("block.0", "MixedConv2d", (2, 4), (2, 4, 8), ""),
            LayerSummary("mix", "Conv1d", None, None, "Conv1d: only Conv2d and Linear are quantized"),
            LayerSummary("first", "Linear", None, None, "float: no bit-width was given to it"),
            LayerSummary("second", "QuantLinear", 3, 5, ""),
            LayerSummary("head", "QuantLinear", 8, 8, ""),
        ]

    def test_of_a_float_model(self, model):
        assert [row.name for row in quantization_summary(model) if row.weight_bits is None] == [
            "stem",
            "block.0",
            "mix",
            "first",
            "second",
            "head",
        ]
