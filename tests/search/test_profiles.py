import pytest
import torch
from torch import nn

from asga.convert import prepare, quantize
from asga.nn.calibration import calibrate
from asga.search.profiles import LayerProfile, layer_input, profile_layers, run_once
from asga.search.space import SearchSpace

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
        assert profiles["depthwise"] == LayerProfile("depthwise", "Conv2d", 3456, 16 * 9, 16, 8 * 4 * 6)
        assert profiles["head"] == LayerProfile("head", "Linear", 60, 60, 5, 12)

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
        assert (profiles["keep"].in_numel, profiles["flat"].in_numel) == (7 * 4, 7 * 6)

    def test_module_used_twice_adds_up(self):
        layer = nn.Linear(4, 4)
        profiles = profile_layers(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 4), ["0"])
        assert profiles["0"].macs == 2 * 16
        assert profiles["0"].weight_numel == 16

    def test_tied_weights_say_so(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        found = profile_layers(model, torch.zeros(1, 4), ["0", "1", "2"])
        assert [layer.tied_to for layer in found.values()] == ["0", None, "0"]
        assert profile_layers(model, torch.zeros(1, 4), ["2"])["2"].tied_to is None

    def test_inputs_of_one_sample_and_the_largest_of_several_calls(self):
        class Pyramid(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(2, 2, 1)

            def forward(self, x):
                return self.conv(input=x[:, :, ::2, ::2]).sum() + self.conv(x).sum()

        assert profile_layers(Pyramid(), torch.randn(3, 2, 8, 6), ["conv"])["conv"].in_numel == 2 * 8 * 6

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
        profiles = profile_layers(net, torch.randn(1, 2), ["0", "0.spare"], unused=["0.spare"])
        assert (profiles["0"].macs, profiles["0.spare"].macs, profiles["0.spare"].weight_numel) == (4, 0, 4)

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


def test_latencies_from_json_are_looked_up_by_bits():
    profile = LayerProfile("a", "Linear", 1, 1, 1, 1, [[4, 8, 30], [None, None, 70]])
    assert profile == LayerProfile("a", "Linear", 1, 1, 1, 1, ((4, 8, 30), (None, None, 70)))
    assert profile.times == {(4, 8): 30, (None, None): 70}


def test_run_once_has_no_gradient_and_eval_mode():
    seen = []

    def note(module, args, kwargs, output):
        seen.append((module.training, torch.is_grad_enabled(), layer_input(args, kwargs).shape))

    model = nn.Dropout().train()
    model.register_forward_hook(note, with_kwargs=True)
    run_once(model, {"input": torch.zeros(2, 3)})
    assert seen == [(False, False, (2, 3))]
    assert model.training
