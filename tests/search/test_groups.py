import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from asga.models import mobilenet_v2, resnet20
from asga.nn.quantizable import find_quantizable
from asga.search.groups import Group, find_groups, joined


def groups_of(model: nn.Module, rule: str, example: object) -> dict[tuple[str, ...], str]:
    found = find_groups(model, example, list(find_quantizable(model)[0]), rule)
    return {group.layers: group.share for group in found}


IMAGE = torch.zeros(1, 3, 32, 32)


class TestResidual:
    def test_resnet(self):
        """The first convolutions of the blocks of a stage read what is added there; so do those after the stage."""
        assert groups_of(resnet20(), "residual", IMAGE) == {
            (
                "layer1.0.conv1",
                "layer1.1.conv1",
                "layer1.2.conv1",
                "layer2.0.conv1",
                "layer2.0.downsample.0",
            ): "act",
            ("layer2.1.conv1", "layer2.2.conv1", "layer3.0.conv1", "layer3.0.downsample.0"): "act",
            ("layer3.1.conv1", "layer3.2.conv1"): "act",
        }

    def test_mobilenet(self):
        """Only blocks of stride 1 with as many channels out as in add anything."""
        found = groups_of(mobilenet_v2(10, small_images=True), "residual", IMAGE)
        blocks = [(3, 4), (5, 6, 7), (8, 9, 10, 11), (12, 13, 14), (15, 16, 17)]
        assert list(found) == [tuple(f"features.{k}.conv.0.0" for k in block) for block in blocks]

    @pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
    @pytest.mark.parametrize("through", ["relu", "pool", "pad", "view", "dropout"])
    def test_operations_that_keep_the_grid_are_looked_through(self, inplace, through):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

            def forward(self, x):
                x = functional.relu6(self.a(x), inplace=inplace)
                y = self.b(x)
                y += x  # in place as well
                keep = {
                    "relu": lambda y: functional.relu(y, inplace=inplace),
                    "pool": lambda y: functional.max_pool2d(y, 2),
                    "pad": lambda y: functional.pad(y, (1, 1, 1, 1)),
                    "view": lambda y: y.transpose(2, 3)[:, :, 1:].contiguous(),
                    "dropout": lambda y: functional.dropout(y, training=self.training),
                }[through]
                return self.c(keep(y))

        assert groups_of(Net(), "residual", torch.zeros(1, 4, 8, 8)) == {("b", "c"): "act"}

    @pytest.mark.parametrize(
        "between",
        [functional.silu, functional.avg_pool2d, "norm", "scale"],
        ids=["silu", "avg_pool2d", "norm", "scale"],
    )
    def test_what_computes_new_values_ends_a_stream(self, between):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
                self.norm = nn.GroupNorm(2, 4)

            def forward(self, x):
                x = self.a(x)
                y = self.b(x) + x
                if between == "norm":
                    y = self.norm(y)
                elif between == "scale":
                    y = y * 0.5
                else:
                    y = between(y, 2) if between is functional.avg_pool2d else between(y)
                return self.c(y)

        assert groups_of(Net(), "residual", torch.zeros(1, 4, 8, 8)) == {}

    def test_biases_and_broadcast_embeddings_are_no_branches(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
                self.position = nn.Parameter(torch.zeros(1, 5, 4))

            def forward(self, x):
                time = self.c(x[:, :1])
                x = self.a(x) + self.position
                return self.b(x + time)

        assert groups_of(Net(), "residual", torch.zeros(1, 5, 4)) == {}


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **sizes))


class TestSameInput:
    def test_query_key_value(self):
        ids = torch.ones(1, 6, dtype=torch.int64)
        model = bert()
        attention = [
            tuple(f"bert.encoder.layer.{k}.attention.self.{part}" for part in ("query", "key", "value")) for k in (0, 1)
        ]
        assert groups_of(model, "qkv", {"input_ids": ids}) == dict.fromkeys(attention, "both")
        # A layer norm follows each sum, so nothing but query, key and value reads what is added.
        assert groups_of(model, "residual", {"input_ids": ids}) == dict.fromkeys(attention, "act")

    def test_gate_and_up_of_another_architecture(self):
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=1, **sizes)
        model = transformers.LlamaForCausalLM(config)
        found = groups_of(model, "qkv", {"input_ids": torch.ones(1, 6, dtype=torch.int64)})
        layer = "model.layers.0."
        assert list(found) == [
            tuple(f"{layer}self_attn.{part}_proj" for part in "qkv"),
            tuple(f"{layer}mlp.{part}_proj" for part in ("gate", "up")),
        ]
        assert groups_of(model, "residual", {"input_ids": torch.ones(1, 6, dtype=torch.int64)}) == {}

    def test_parts_of_a_tensor_are_not_the_same(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

            def forward(self, x):
                x = x + 1
                u, v = x.chunk(2, -1)
                return self.a(u) * self.b(v) + self.c(u.view(u.shape))

        assert groups_of(Net(), "qkv", torch.zeros(1, 8)) == {("a", "c"): "both"}

    def test_convolutions_are_left_to_other_rules(self):
        assert groups_of(resnet20(), "qkv", IMAGE) == {}


class TestDepthwise:
    def test_mobilenet(self):
        found = groups_of(mobilenet_v2(10, small_images=True), "depthwise", IMAGE)
        first = ("features.1.conv.0.0", "features.1.conv.1")
        assert list(found) == [first, *((f"features.{k}.conv.1.0", f"features.{k}.conv.2") for k in range(2, 18))]
        assert set(found.values()) == {"both"}

    def test_a_pointwise_convolution_must_follow_at_once(self):
        depthwise, grouped = nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(4, 8, 3, groups=2)
        for layers, pairs in (
            ([depthwise, nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 2, 1)], [("0", "3")]),
            ([grouped, nn.Conv2d(8, 2, 1)], []),
            ([depthwise, nn.Conv2d(8, 2, 3)], []),
            ([depthwise, nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1)], []),
        ):
            assert list(groups_of(nn.Sequential(*layers), "depthwise", torch.zeros(1, 4, 9, 9))) == pairs

    def test_a_squeeze_and_excitation_block_does_not_follow_at_once(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
                self.squeeze, self.excite, self.pointwise = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.Conv2d(8, 4, 1)

            def forward(self, x):
                x = functional.silu(self.depthwise(x))
                scale = self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(x, 1))))
                return self.pointwise(x * scale.sigmoid())

        assert groups_of(Net(), "depthwise", torch.zeros(1, 8, 9, 9)) == {}


def test_the_model_is_left_as_it_was():
    model = mobilenet_v2(10, small_images=True).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    groups_of(model, "residual", IMAGE)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_that_is_called_twice_reads_both():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = torch.sin(x)
            return self.a(x), self.a(y), self.b(y)

    assert groups_of(Net(), "qkv", torch.zeros(2, 4)) == {("a", "b"): "both"}


def test_joined():
    assert joined([]) == []
    assert sorted(map(sorted, joined([[1, 2], [3], [4, 5], [2, 4], [6, 3]]))) == [[1, 2, 4, 5], [3, 6]]


class TestGroup:
    def test_sides(self):
        assert Group(["a", "b"]).sides == ("weight", "act")
        assert Group(["a", "b"], "act").sides == ("act",)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (("a.*",), TypeError, "layers of a group are 'a.*'; a sequence"),
            (([1],), TypeError, r"layers of a group are \[1\]"),
            (([],), ValueError, "a group has no layers"),
            ((["a"], "input"), ValueError, "share of a group is 'input'; it must be 'weight', 'act' or 'both'"),
        ],
    )
    def test_bad_values(self, arguments, error, message):
        with pytest.raises(error, match=message):
            Group(*arguments)
