import numpy as np
import pytest
import torch
from torch import nn

from asga.convert import prepare, quantize
from asga.nn import FloatWeightQuantizer
from asga.nn.calibration import calibrate
from asga.policy import LayerPolicy, Policy
from asga.search.costs import (
    Costs,
    LayerProfile,
    cost_tables,
    layer_size_bits,
    policy_costs,
    profile_layers,
)
from asga.search.space import LayerChoices, SearchSpace, SpaceChoices

# Input 3 x 12 x 12. Name, layer, MACs by hand: output positions x output channels x (inputs of one output).
BY_HAND = [
    ("plain", nn.Conv2d(3, 8, 3, padding=1), 12 * 12 * 8 * (3 * 9)),
    ("strided", nn.Conv2d(8, 12, 3, stride=2, padding=1), 6 * 6 * 12 * (8 * 9)),
    ("grouped", nn.Conv2d(12, 8, (3, 1), groups=4), 4 * 6 * 8 * (3 * 3)),
    ("depthwise", nn.Conv2d(8, 16, 3, groups=8, padding=1, bias=False), 4 * 6 * 16 * (1 * 9)),
    ("dilated", nn.Conv2d(16, 4, 2, dilation=3), 1 * 3 * 4 * (16 * 4)),
    ("flatten", nn.Flatten(), None),
    ("head", nn.Linear(12, 5), 12 * 5),
]
QUANTIZABLE = [name for name, _, macs in BY_HAND if macs is not None]


def net_by_hand() -> nn.Sequential:
    net = nn.Sequential()
    for name, layer, _ in BY_HAND:
        net.add_module(name, layer)
    return net


class TestProfile:
    @pytest.mark.parametrize("batch", [1, 3])
    def test_macs_by_hand(self, batch):
        profiles = profile_layers(net_by_hand(), torch.randn(batch, 3, 12, 12), QUANTIZABLE)
        assert [p.macs for p in profiles.values()] == [m for _, _, m in BY_HAND if m is not None]
        assert profiles["depthwise"] == LayerProfile("depthwise", "Conv2d", 3456, 16 * 9, 16)
        assert profiles["head"] == LayerProfile("head", "Linear", 60, 60, 5)

    def test_order_is_that_of_the_names(self):
        names = QUANTIZABLE[::-1]
        assert list(profile_layers(net_by_hand(), torch.randn(1, 3, 12, 12), names)) == names

    def test_linear_on_sequences_and_on_flattened_tokens(self):
        class Tokens(nn.Module):
            def __init__(self):
                super().__init__()
                self.keep, self.flat = nn.Linear(4, 6), nn.Linear(6, 2)

            def forward(self, x):
                return self.flat(self.keep(x).reshape(-1, 6))

        profiles = profile_layers(Tokens(), torch.randn(2, 7, 4), ["keep", "flat"])
        assert profiles["keep"].macs == 7 * 4 * 6
        assert profiles["flat"].macs == 7 * 6 * 2

    def test_module_used_twice_adds_up(self):
        layer = nn.Linear(4, 4)
        profiles = profile_layers(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 4), ["0"])
        assert profiles["0"].macs == 2 * 16
        assert profiles["0"].weight_numel == 16

    @pytest.mark.parametrize("kind", ["positional", "keyword"])
    def test_several_inputs(self, kind):
        class Sum(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(3, 2)

            def forward(self, x, y, scale):
                return self.fc(x + y) * scale

        x, y = torch.randn(4, 3), torch.randn(4, 3)
        inputs = (x, y, 0.5) if kind == "positional" else {"scale": 0.5, "y": y, "x": x}
        assert profile_layers(Sum(), inputs, ["fc"])["fc"].macs == 6

    def test_converted_models_cost_the_same(self):
        net, space = net_by_hand(), SearchSpace(weight_bits=(2, 4), act_bits=(3, 8))
        x = torch.randn(2, 3, 12, 12)
        expected = profile_layers(net, x, QUANTIZABLE)
        choices = space.choices(net)
        for converted in (prepare(net, space), quantize(net, choices.uniform(4, 4))):
            calibrate(converted, [x])
            assert profile_layers(converted, x, choices.names) == expected

    def test_layer_that_is_never_called(self):
        net = nn.Sequential(nn.Linear(2, 2))
        net[0].spare = nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"never called by the model's forward: '0\.spare'"):
            profile_layers(net, torch.randn(1, 2), ["0", "0.spare"])

    def test_names_and_inputs_are_checked(self):
        net = net_by_hand()
        x = torch.randn(1, 3, 12, 12)
        with pytest.raises(ValueError, match="no module 'heda'; did you mean 'head'"):
            profile_layers(net, x, ["heda"])
        with pytest.raises(TypeError, match="module 'flatten' is a Flatten"):
            profile_layers(net, x, ["flatten"])
        with pytest.raises(ValueError, match=r"shape \(0, 3, 12, 12\); a batch of at least one"):
            profile_layers(net, x[:0], ["head"])
        with pytest.raises(TypeError, match="no tensor"):
            profile_layers(net, {"size": 3}, ["head"])


class Restless(nn.Module):
    """Changes its buffers, one in place and one by assignment, and draws random numbers, in eval mode too."""

    def __init__(self, fail: bool):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))
        self.register_buffer("cache", None)
        self.fail = fail

    def forward(self, x):
        self.calls.add_(1)
        self.last = torch.rand(2)
        self.cache = x
        y = self.body.train()(x)
        if self.fail:
            raise RuntimeError("out of memory")
        return y


class TestProfileLeavesTheModelAlone:
    @pytest.mark.parametrize("fail", [False, True], ids=["returns", "raises"])
    def test_everything_is_as_before(self, fail):
        torch.manual_seed(0)
        model = Restless(fail)
        model.body[1].eval()
        calls = []
        model.body[0].register_forward_hook(lambda *args: calls.append(1))
        state = {name: value.clone() for name, value in model.state_dict().items()}
        buffers, training = dict(model.named_buffers()), [m.training for m in model.modules()]
        random_state = torch.get_rng_state()

        if fail:
            with pytest.raises(RuntimeError, match="out of memory"):
                profile_layers(model, torch.ones(2, 3, 5, 5), ["body.0"])
        else:
            profile_layers(model, torch.ones(2, 3, 5, 5), ["body.0"])

        assert len(calls) == 1
        assert [m.training for m in model.modules()] == training
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(value is buffers[name] for name, value in model.named_buffers())
        assert model.cache is None
        assert torch.equal(torch.get_rng_state(), random_state)
        assert len(model.body[0]._forward_hooks) == 1
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert torch.is_grad_enabled()


PROFILES = {
    "a": LayerProfile("a", "Conv2d", macs=1000, weight_numel=90, out_channels=5),
    "b": LayerProfile("b", "Conv2d", macs=300, weight_numel=40, out_channels=4),
    "c": LayerProfile("c", "Linear", macs=20, weight_numel=20, out_channels=2),
}


class TestCosts:
    def test_by_hand(self):
        policy = Policy({"a": LayerPolicy(3, 4), "b": LayerPolicy(8, 2), "c": LayerPolicy(2, 2)})
        bitops = 1000 * 12 + 300 * 16 + 20 * 4
        size_bits = (90 * 3 + 32 * 6) + (40 * 8 + 32 * 5) + (20 * 2 + 32 * 3)
        assert policy_costs(PROFILES, policy) == Costs(bitops, size_bits)
        assert size_bits == 1078
        assert policy_costs(PROFILES, policy).size_bytes == 135  # 134.75 rounded up

    @pytest.mark.parametrize(
        ("bits", "bitops", "size_bits"),
        [
            (LayerPolicy(None, None), 20 * 32 * 32, 20 * 32),
            (LayerPolicy(4, None), 20 * 4 * 32, 20 * 4 + 32 * 2),
            (LayerPolicy(None, 4), 20 * 32 * 4, 20 * 32 + 32),
        ],
        ids=["float", "float input", "float weight"],
    )
    def test_float_tensors_count_32_bits_and_have_no_scale(self, bits, bitops, size_bits):
        assert policy_costs({"c": PROFILES["c"]}, Policy({"c": bits})) == Costs(bitops, size_bits)

    def test_small_floats_by_hand(self):
        policy = Policy({"a": LayerPolicy("fp8", 4), "b": LayerPolicy("fp4", 2), "c": LayerPolicy("fp4", None)})
        bitops = 1000 * 8 * 4 + 300 * 4 * 2 + 20 * 4 * 32
        # a: 5 channels; b: 4 channels of 10 values, a block each; c: 2 channels of 10 values.
        size_bits = (90 * 8 + 32 * 6) + (40 * 4 + 4 * 8 + 32 + 32) + (20 * 4 + 2 * 8 + 32)
        assert policy_costs(PROFILES, policy) == Costs(bitops, size_bits)

    @pytest.mark.parametrize(("values", "blocks"), [(16, 1), (17, 2), (160, 10)])
    def test_blocks_are_counted_per_channel(self, values, blocks):
        layer = LayerProfile("a", "Linear", macs=1, weight_numel=3 * values, out_channels=3)
        assert layer_size_bits(layer, "fp4", None) == 3 * values * 4 + 3 * blocks * 8 + 32

    def test_scales_counted_are_those_of_the_quantizer(self):
        weight = torch.randn(5, 7, 3, 3)
        layer = LayerProfile("a", "Conv2d", macs=1, weight_numel=weight.numel(), out_channels=5)
        for bits, per_scale, more in (("fp4", 8, 32), ("fp8", 32, 0)):
            scales = FloatWeightQuantizer(weight, bits).scale.numel()
            assert layer_size_bits(layer, bits, None) == weight.numel() * int(bits[2]) + scales * per_scale + more

    def test_policy_and_profiles_must_be_about_the_same_layers(self):
        with pytest.raises(ValueError, match="does not mention: 'c'"):
            policy_costs(PROFILES, Policy({"a": LayerPolicy(2, 2), "b": LayerPolicy(2, 2)}))
        with pytest.raises(ValueError, match="not in the model:\n  'd'"):
            policy_costs(PROFILES, Policy(dict.fromkeys("abcd", LayerPolicy(2, 2))))


class TestTables:
    CHOICES = SpaceChoices(
        layers={"a": LayerChoices((2, 3), (2, 4, 8)), "b": LayerChoices((8,), (8,), pinned=True)},
        skipped={"c": "excluded by the search space"},
        names=("a", "b", "c"),
    )

    def test_every_entry_is_the_cost_of_that_policy(self):
        tables = cost_tables(PROFILES, self.CHOICES)
        assert {name: table.shape for name, table in tables["bitops"].items()} == {
            "a": (2, 3),
            "b": (1, 1),
            "c": (1, 1),
        }
        for i, j in np.ndindex(2, 3):
            costs = policy_costs(PROFILES, self.CHOICES.policy({"a": (i, j), "b": (0, 0)}))
            for metric, table in tables.items():
                assert table["a"].dtype == np.int64
                assert table["a"][i, j] + table["b"][0, 0] + table["c"][0, 0] == getattr(costs, metric)

    def test_totals_beyond_64_bits_are_refused(self):
        huge = LayerProfile("a", "Linear", macs=2**59, weight_numel=1, out_channels=1)
        with pytest.raises(ValueError, match=r"bitops of the largest policy is .*64-bit"):
            cost_tables(PROFILES | {"a": huge}, self.CHOICES)

    def test_missing_profile(self):
        with pytest.raises(ValueError, match="profiles lacks layers of the search space: 'c'"):
            cost_tables({"a": PROFILES["a"], "b": PROFILES["b"]}, self.CHOICES)

    def test_from_a_model(self):
        net = net_by_hand()
        choices = SearchSpace(exclude=("grouped",)).choices(net)
        profiles = profile_layers(net, torch.randn(2, 3, 12, 12), choices.names)
        tables = cost_tables(profiles, choices)
        assert tables["bitops"]["grouped"].tolist() == [[4 * 6 * 8 * 9 * 1024]]
        assert tables["bitops"]["plain"].tolist() == [[12 * 12 * 8 * 27 * 64]]
