import os
import sys

import pytest
import torch
from torch import nn

from asga.models import BUILTIN_MODELS, build_model, mobilenet_v2, resnet18, resnet20


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model, *shape):
    """Multiply-accumulates of convolutions and linear layers in one forward pass."""
    macs = 0

    def hook(module, inputs, output):
        nonlocal macs
        # Every output value sums over one filter (or row of the matrix).
        macs += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(hook)
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return macs


class TestSizes:
    @pytest.mark.parametrize(
        ("model", "count"),
        [
            # Published by torchvision for its weights.
            (resnet18, 11_689_512),
            (mobilenet_v2, 3_504_872),
            # 269,722 with shortcuts of zeros, and two 1x1 convolutions with BatchNorm:
            # 16 * 32 + 2 * 32 and 32 * 64 + 2 * 64.
            (resnet20, 269_722 + 576 + 2_176),
        ],
    )
    def test_parameters(self, model, count):
        assert count_parameters(model()) == count

    @pytest.mark.parametrize(
        ("model", "macs"),
        [
            # Published by torchvision: 1.814 and 0.301 billion.
            (resnet18(), 1_814_073_344),
            (mobilenet_v2(), 300_774_272),
        ],
        ids=["resnet18", "mobilenet_v2"],
    )
    def test_macs_at_224(self, model, macs):
        assert count_macs(model, 3, 224, 224) == macs

    def test_macs_of_resnet20(self):
        stem = 32 * 32 * 27 * 16
        same = 32 * 32 * 9 * 16 * 16  # One 3x3 convolution; halving the size and doubling the width keeps it.
        entry = same // 2  # The first of a stage reads half the channels.
        shortcut = 16 * 16 * 16 * 32
        expected = stem + 6 * same + 2 * (5 * same + entry + shortcut) + 640
        assert count_macs(resnet20(), 3, 32, 32) == expected


class TestNames:
    def test_resnet18_as_torchvision(self):
        names = ["conv1.weight", *bn("bn1")]
        for stage in range(1, 5):
            for block in range(2):
                prefix = f"layer{stage}.{block}"
                names += [f"{prefix}.conv1.weight", *bn(f"{prefix}.bn1")]
                names += [f"{prefix}.conv2.weight", *bn(f"{prefix}.bn2")]
                if stage > 1 and block == 0:
                    names += [f"{prefix}.downsample.0.weight", *bn(f"{prefix}.downsample.1")]
        names += ["fc.weight", "fc.bias"]
        state = resnet18().state_dict()
        assert list(state) == names
        assert state["conv1.weight"].shape == (64, 3, 7, 7)
        assert state["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
        assert state["fc.weight"].shape == (1000, 512)

    def test_mobilenet_v2_as_torchvision(self):
        names = ["features.0.0.weight", *bn("features.0.1")]
        names += ["features.1.conv.0.0.weight", *bn("features.1.conv.0.1")]
        names += ["features.1.conv.1.weight", *bn("features.1.conv.2")]
        for i in range(2, 18):
            prefix = f"features.{i}.conv"
            names += [f"{prefix}.0.0.weight", *bn(f"{prefix}.0.1")]
            names += [f"{prefix}.1.0.weight", *bn(f"{prefix}.1.1")]
            names += [f"{prefix}.2.weight", *bn(f"{prefix}.3")]
        names += ["features.18.0.weight", *bn("features.18.1"), "classifier.1.weight", "classifier.1.bias"]
        state = mobilenet_v2().state_dict()
        assert list(state) == names
        assert state["features.2.conv.1.0.weight"].shape == (96, 1, 3, 3)
        assert state["features.17.conv.2.weight"].shape == (320, 960, 1, 1)
        assert state["features.18.0.weight"].shape == (1280, 320, 1, 1)

    def test_resnet20_layers(self):
        layers = [name for name, module in resnet20().named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        expected = ["conv1"]
        for stage in range(1, 4):
            for block in range(3):
                expected += [f"layer{stage}.{block}.conv1", f"layer{stage}.{block}.conv2"]
                if stage > 1 and block == 0:
                    expected.append(f"layer{stage}.0.downsample.0")
        assert layers == [*expected, "fc"]

    @pytest.mark.parametrize("model", [resnet18, mobilenet_v2])
    def test_small_images_keep_the_names(self, model):
        assert list(model(small_images=True).state_dict()) == list(model().state_dict())

    def test_mobilenet_v2_for_small_images_takes_the_same_weights(self):
        mobilenet_v2(small_images=True).load_state_dict(mobilenet_v2().state_dict())


def bn(prefix):
    return [f"{prefix}.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


class TestForward:
    @pytest.mark.parametrize("size", [8, 16, 32, 33, 64])
    def test_resnet20_at_any_size(self, size):
        assert resnet20(7, in_channels=1)(torch.zeros(2, 1, size, size)).shape == (2, 7)

    @pytest.mark.parametrize("model", [resnet18, mobilenet_v2])
    @pytest.mark.parametrize(("size", "small_images"), [(16, True), (32, True), (64, False), (97, False)])
    def test_others(self, model, size, small_images):
        network = model(7, in_channels=2, small_images=small_images).eval()
        assert network(torch.zeros(2, 2, size, size)).shape == (2, 7)

    @pytest.mark.parametrize(
        ("model", "last", "small_images", "side"),
        [
            (resnet18, "layer4", False, 1),
            (resnet18, "layer4", True, 4),
            (mobilenet_v2, "features", False, 1),
            (mobilenet_v2, "features", True, 4),
        ],
    )
    def test_small_images_reduce_the_stride_to_8(self, model, last, small_images, side):
        network = model(small_images=small_images).eval()
        shapes = []
        network.get_submodule(last).register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
        network(torch.zeros(1, 3, 32, 32))
        assert shapes[0][2:] == (side, side)

    @pytest.mark.parametrize("name", BUILTIN_MODELS)
    def test_every_parameter_gets_a_gradient(self, name):
        torch.manual_seed(0)
        model = build_model(name, num_classes=5)
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

    def test_convolutions_start_as_in_the_paper(self):
        torch.manual_seed(0)
        model = resnet20()
        weight = model.layer3[2].conv2.weight
        # He initialization: variance 2 / (9 * 64) with fan-out; 36,864 draws give it within 5 % (7 sigma).
        assert weight.var().item() == pytest.approx(2 / (9 * 64), rel=0.05)


class TestBuildModel:
    def test_builtin(self):
        model = build_model("resnet18", num_classes=10, in_channels=1, small_images=True)
        assert model.conv1.weight.shape == (64, 1, 3, 3)
        assert model.fc.out_features == 10

    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        """A module in the current directory, which is not on the path."""
        (tmp_path / "my_zoo.py").write_text(
            "from torch import nn\n"
            "def plain(num_classes):\n    return nn.Linear(4, num_classes)\n"
            "def colored(num_classes, in_channels=3):\n    return nn.Conv2d(in_channels, num_classes, 1)\n"
            "def anything(**options):\n    model = nn.Identity()\n    model.options = options\n"
            "    return model\n"
            "def wrong(num_classes):\n    return num_classes\n"
            "def no_classes():\n    return nn.Identity()\n"
            "def fails(num_classes):\n    return nn.Linear(4, {}['depth'])\n"
            "constant = 3\n"
        )
        (tmp_path / "broken_zoo.py").write_text("import no_such_dependency\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
        yield
        for name in ("my_zoo", "broken_zoo"):
            sys.modules.pop(name, None)

    def test_factory_in_the_current_directory(self, module):
        assert build_model("my_zoo:plain", 6).out_features == 6

    def test_in_channels_where_taken(self, module):
        assert build_model("my_zoo:colored", 6, in_channels=2).weight.shape == (6, 2, 1, 1)

    def test_any_argument_where_taken(self, module):
        model = build_model("my_zoo:anything", 6, 2, width=4)
        assert model.options == {"num_classes": 6, "in_channels": 2, "width": 4}

    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            ("resnet81", ValueError, "use resnet20, resnet18, mobilenet_v2, or .* Did you mean resnet18"),
            ("no_such_zoo:model", ValueError, "module no_such_zoo cannot be imported"),
            (
                "broken_zoo:model",
                ValueError,
                "broken_zoo cannot be imported: No module named 'no_such_dependency'",
            ),
            ("my_zoo:plane", ValueError, r"my_zoo\.py has no function or class plane; nearest: plain"),
            ("my_zoo:constant", ValueError, "no function or class constant"),
            ("my_zoo:", ValueError, "'my_zoo:' is not known"),
            ("my_zoo:wrong", TypeError, "returned int; a factory must return a torch.nn.Module"),
            ("my_zoo:no_classes", TypeError, "takes no argument num_classes"),
            (
                "my_zoo:fails",
                ValueError,
                r"'my_zoo:fails' cannot be built: KeyError: 'depth' \(.*my_zoo\.py, line \d+\)",
            ),
        ],
    )
    def test_bad_names(self, module, name, error, message):
        with pytest.raises(error, match=message):
            build_model(name, num_classes=4)

    def test_unknown_option(self):
        with pytest.raises(TypeError, match="'resnet20' takes no argument small_images; it takes num_classes"):
            build_model("resnet20", num_classes=4, small_images=True)

    @pytest.mark.parametrize("argument", ["num_classes", "in_channels"])
    def test_counts(self, argument):
        with pytest.raises(ValueError, match=f"{argument} is 0"):
            build_model("resnet20", **({"num_classes": 1} | {argument: 0}))
