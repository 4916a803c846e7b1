"""Small reference networks, and models by name.

ResNet-18 and MobileNet-V2 have torchvision's parameter names and shapes, so that its checkpoints load.
"""

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def resnet20(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-20 for 32x32 images: a 3x3 stem and three stages of three blocks, 16, 32 and 64 wide.

    Shortcuts between stages are 1x1 convolutions with BatchNorm (the paper's option B, named ``downsample``
    as in torchvision), not its padding with zeros (option A): 272,474 instead of 269,722 parameters with 10
    classes.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """
    return _ResNet((3, 3, 3), (16, 32, 64), num_classes, in_channels, small_images=True)


def resnet18(num_classes: int = 1000, in_channels: int = 3, small_images: bool = False) -> nn.Module:
    """ResNet-18, with torchvision's parameter names.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        small_images: A 3x3 stem of stride 1 without pooling, for images of about 32x32: the total stride is 8
            instead of 32. ``conv1.weight`` then has another shape than torchvision's.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1.
    """
    return _ResNet((2, 2, 2, 2), (64, 128, 256, 512), num_classes, in_channels, small_images)


def mobilenet_v2(num_classes: int = 1000, in_channels: int = 3, small_images: bool = False) -> nn.Module:
    """MobileNet-V2 at width 1, with torchvision's parameter names.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        small_images: Stride 1 instead of 2 in the stem and in the second stage, for images of about 32x32:
            the total stride is 8 instead of 32. Parameters keep their shapes.

    Source:
        Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2.
    """
    return _MobileNetV2(num_classes, in_channels, small_images)


BUILTIN_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet18": resnet18,
    "mobilenet_v2": mobilenet_v2,
}


def build_model(name: str, num_classes: int, in_channels: int = 3, **options: object) -> nn.Module:
    """Build a model by the name of a builtin or of a factory in a Python module.

    Args:
        name: ``resnet20``, ``resnet18``, ``mobilenet_v2`` or ``package.module:factory``. The module is
            imported as Python would from the current directory, which is put first on ``sys.path``.
        num_classes: Given to the factory by this name.
        in_channels: Given to the factory if it takes an argument of this name.
        options: Further arguments of the factory, such as ``small_images``.

    Returns:
        The model, on the device and in the mode in which the factory left it.

    Raises:
        ValueError: The name is unknown, the module cannot be imported or has no such factory, the factory fails, or
            `num_classes` or `in_channels` is not positive.
        TypeError: The factory lacks an argument, or does not return an ``nn.Module``.
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{argument} is {value}; it must be at least 1")
    factory = BUILTIN_MODELS.get(name) or _import_factory(name)
    parameters = inspect.signature(factory).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments = {"num_classes": num_classes, **options}
    if takes_any or "in_channels" in parameters:
        arguments["in_channels"] = in_channels
    missing = [argument for argument in arguments if not takes_any and argument not in parameters]
    if missing:
        raise TypeError(f"model {name!r} takes no argument {', '.join(missing)}; it takes {', '.join(parameters)}")
    try:
        model = factory(**arguments)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"model {name!r} cannot be built: {what} ({frame.filename}, line {frame.lineno})") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"model {name!r} returned {type(model).__name__}; a factory must return a torch.nn.Module")
    return model


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class _ResNet(nn.Module):
    """Stages ``layer1``, ``layer2``, ... of basic blocks; every stage but the first halves the resolution."""

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        in_channels: int,
        small_images: bool,
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        self._stages = [f"layer{i + 1}" for i in range(len(depths))]
        width = widths[0]
        for i, (stage, depth, out_width) in enumerate(zip(self._stages, depths, widths, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(_BasicBlock(width, out_width, stride=2 if i > 0 and j == 0 else 1))
                width = out_width
            self.add_module(stage, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self._stages:
            x = getattr(self, stage)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class _InvertedResidual(nn.Module):
    """Expand with a 1x1 convolution, filter each channel, project back without an activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(_conv_bn_relu6(in_channels, hidden, kernel=1))
        layers += [
            _conv_bn_relu6(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.use_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_shortcut else self.conv(x)


class _MobileNetV2(nn.Module):
    # Table 2 of the paper: expansion, channels, blocks, stride of the first block.
    _STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, num_classes: int, in_channels: int, small_images: bool) -> None:
        super().__init__()
        features: list[nn.Module] = [_conv_bn_relu6(in_channels, 32, kernel=3, stride=1 if small_images else 2)]
        width = 32
        for stage, (expansion, channels, blocks, stride) in enumerate(self._STAGES):
            if small_images and stage == 1:
                stride = 1
            for block in range(blocks):
                features.append(_InvertedResidual(width, channels, stride if block == 0 else 1, expansion))
                width = channels
        features.append(_conv_bn_relu6(width, 1280, kernel=1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))
        _initialize(self)
        nn.init.normal_(self.classifier[1].weight, std=0.01)
        nn.init.zeros_(self.classifier[1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def _conv_bn_relu6(
    in_channels: int, out_channels: int, *, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


def _initialize(model: nn.Module) -> None:
    """Initialize convolutions as in He et al., "Delving Deep into Rectifiers", ICCV 2015, eq. 14, fan-out."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _import_factory(name: str) -> Callable[..., nn.Module]:
    builtins = ", ".join(BUILTIN_MODELS)
    module_name, separator, attribute = name.partition(":")
    if not (separator and module_name and attribute):
        near = difflib.get_close_matches(name, BUILTIN_MODELS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"model {name!r} is not known; use {builtins}, or package.module:factory.{hint}")
    # The `asga` command has its own folder first on the path, where `python -m` has the current one.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"model {name!r}: module {module_name} cannot be imported: {error}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        there = difflib.get_close_matches(attribute, dir(module), cutoff=0.4)
        hint = f"; nearest: {', '.join(there)}" if there else ""
        raise ValueError(f"model {name!r}: {module.__file__} has no function or class {attribute}{hint}")
    return factory
