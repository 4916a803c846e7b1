"""Options that several commands share, and what is built from them: data, models, budgets."""

import argparse
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from asga.cli.console import Console
from asga.data import Batches, ImageFiles, ImageTensor, open_dataset
from asga.models import build_model
from asga.policy import Policy, WeightBits
from asga.search import Budget, Group
from asga.search.budget import LIMIT_NAMES

# Up to this side the stems of ImageNet models would leave next to nothing of an image: 32 pixels become 1.
_SMALL_IMAGE = 64
# What stands for the two parts of a pin in messages about arguments.
_PIN_SIDES = {None: "", "0": " (weight)", "1": " (input)"}
# Options that name a file.
_FILES = ("init", "proxy_init", "latency_table", "policy", "search")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """--data and what to take of it."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", required=True, help="digits, imagefolder:PATH or cifar10:PATH")
    group.add_argument("--limit", type=int, help="train on this many images, equally many of each class")
    group.add_argument("--image-size", type=int, help="resize images to this side; default: as they are")
    group.add_argument("--batch-size", type=int, default=128)


def add_training_options(
    parser: argparse.ArgumentParser, *, methods: Mapping[str, str], epochs: int, float_epochs: int
) -> None:
    """Epochs, method (by name what it is), and `add_float_options`."""
    group = add_float_options(parser, float_epochs=float_epochs)
    group.add_argument("--epochs", type=int, default=epochs)
    described = "; ".join(f"{name}: {what}" for name, what in methods.items())
    group.add_argument("--method", choices=tuple(methods), default="asga", help=described)


def add_float_options(parser: argparse.ArgumentParser, *, float_epochs: int) -> argparse._ArgumentGroup:
    """Where the float model comes from, device and precision; more can be added to the group."""
    group = parser.add_argument_group("training")
    group.add_argument("--init", metavar="FILE", help="weights of the float model (a state dict); default: train one")
    group.add_argument("--float-epochs", type=int, default=float_epochs, help="epochs to train the float model")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    group.add_argument("--seed", type=int, default=0)
    return group


def add_run_options(parser: argparse.ArgumentParser, *, out: str) -> argparse._ArgumentGroup:
    """The run folder; more can be added to the group."""
    group = parser.add_argument_group("run folder")
    group.add_argument("--out", default=out, metavar="FOLDER", help="where checkpoints and results go")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return group


def check_at_least_one(options: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below 1 before anything is read or trained.

    Raises:
        ValueError: One is.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def recorded(options: argparse.Namespace) -> dict[str, object]:
    """The options as they go into ``config.json``: without those that do not change what is computed.

    Of files their content counts, too, as ``init_sha256`` and the like: a run is not resumed with another one.
    """
    left_out = ("run", "command", "out", "resume")
    found = {name: value for name, value in vars(options).items() if name not in left_out}
    for name in _FILES:
        if found.get(name) is not None:
            found[f"{name}_sha256"] = hashlib.sha256(Path(found[name]).read_bytes()).hexdigest()
    return found


def as_typed(message: str, options: argparse.Namespace) -> str:
    """An error's message with the options that were typed in place of the arguments that were made of them.

    Args:
        message: Such as ``"weight_bits[1] is 9; supported are 2 to 8"``.
        options: What was parsed; names of other arguments stay as they are.
    """

    def leading(match: re.Match) -> str:
        name, at, side = match.groups()
        if name in LIMIT_NAMES and hasattr(options, "budget"):
            return f"--budget: {name}"
        if name == "pinned" and hasattr(options, "pin"):
            return f"--pin {at or ''}".rstrip() + _PIN_SIDES[side]
        if name == "groups" and at is not None and getattr(options, "group", None):
            return f"--group {options.group[int(at) - len(split_names(options.groups))]!r}"
        if name == "share" and getattr(options, "held_out", None) is not None:
            return _option("held_out")
        return _option(name) + match[0].removeprefix(name) if hasattr(options, name) else match[0]

    message = re.sub(r"^([a-z_]+)(?:\[('.+?'|\d+)\])?(?:\[([01])\])?(?=: | is | has )", leading, message)
    for name in filter(lambda name: "_" in name, vars(options)):
        message = message.replace(f"{name}=None", f"{_option(name)} {'0' if name == 'first_last' else 'none'}")
        message = re.sub(rf"\b(?<!-){name}(?= is )", _option(name), message)
    return message


def data_name(spec: str) -> str:
    """What to call --data in policies and tables: ``imagefolder:/some/where/cifar10`` is ``cifar10``."""
    scheme, _, path = spec.partition(":")
    return Path(path).name or scheme


def open_batches(options: argparse.Namespace, console: Console) -> tuple[Batches, Batches]:
    """Training and validation batches of --data; the training ones augmented.

    Raises:
        ValueError: The data cannot be used, or --device is not there.
    """
    dataset = open_split(options, "train", console, limit=options.limit)
    train = Batches(dataset, options.batch_size, shuffle=True, augment=True, seed=options.seed, device=options.device)
    val = open_split(options, "val", console)
    return train, validation_batches(val, options.device, mean=train.mean, std=train.std)


def open_split(
    options: argparse.Namespace, split: str, console: Console, *, limit: int | None = None
) -> ImageTensor | ImageFiles:
    """The images of one split of --data.

    Raises:
        ValueError: The data cannot be used, or --device is not there.
    """
    _check_device(options.device)
    with console.reading(f"reading {options.data} ({split})") as progress:
        return open_dataset(
            options.data, split, image_size=options.image_size, limit=limit, seed=options.seed, progress=progress
        )


def validation_batches(
    dataset: ImageTensor | ImageFiles, device: str, *, mean: Sequence[float], std: Sequence[float]
) -> Batches:
    """Batches for evaluation, normalized by the mean and the standard deviation of the training images."""
    # 512 images of any size that fits in memory; evaluation keeps no activations.
    return Batches(dataset, 512, shuffle=False, augment=False, mean=mean, std=std, device=device)


def model_factory(name: str, batches: Batches, device: str) -> Callable[[int], nn.Module]:
    """A function from seed to a new model that fits the images and classes of `batches`."""
    channels, side, _ = batches.dataset.image_shape
    small = name in ("resnet18", "mobilenet_v2") and side <= _SMALL_IMAGE

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        extra = {"small_images": True} if small else {}
        model = build_model(name, batches.dataset.num_classes, channels, **extra).to(device)
        for module in model.modules():
            # A convolution gives what comes after it the layout of its weight. On CPUs, and on GPUs in half precision,
            # those with channels last are faster.
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
        return model

    return build


def load_policy(options: argparse.Namespace) -> tuple[Policy, str]:
    """The policy of --policy, and the architecture: that of --model, or else the one that the policy names.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no policy, or there is no architecture.
    """
    policy = Policy.load(options.policy)
    architecture = options.model or policy.meta.get("architecture")
    if not architecture:
        raise ValueError("--model is needed: the policy does not name its architecture")
    return policy, architecture


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Load a state dict, with an error that names the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no state dict of this model.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except Exception as error:  # torch.load raises many types for what it has not written
        raise ValueError(
            f"{path} is no file of weights, or a damaged one ({type(error).__name__}); a state dict that torch.save "
            f"wrote is needed"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}; a state dict of this model is needed")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of this model: {error}") from error


def autocast_dtype(options: argparse.Namespace) -> torch.dtype | None:
    """What --precision means for autocast."""
    return torch.bfloat16 if options.precision == "bfloat16" else None


def parse_budget(text: str) -> Budget:
    """A budget such as ``bitops=w4a4`` or ``bitops=1.2G,size=1.5MB,latency=5ms``.

    Raises:
        ValueError: It cannot be read.
    """
    metrics = [part.partition("=")[0].strip() for part in text.split(",")]
    if len(set(metrics)) < len(metrics) or not set(LIMIT_NAMES).issuperset(metrics):
        names = ", ".join(LIMIT_NAMES)
        raise ValueError(
            f"--budget: {text!r} is not a budget such as bitops=w4a4 or bitops=1.2G,size=1.5MB; limits are {names}"
        )
    amounts = [part.partition("=")[2] for part in text.split(",")]
    return Budget(**dict(zip(metrics, amounts, strict=True)))


def parse_bits(text: str) -> tuple[WeightBits, ...] | None:
    """Bit-widths such as ``2,3,4,6,8``, names such as ``int4,fp4,fp8`` among them; None for ``none``.

    Raises:
        ValueError: It is nothing of the kind.
    """
    if text == "none":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+|[a-z]+\d+", part) for part in parts):
        raise ValueError(f"{text!r} is not a list of bit-widths such as 2,3,4,6,8 or int4,fp4,fp8")
    return tuple(int(part) if part.isdigit() else part for part in parts)


def split_names(text: str) -> list[str]:
    """Names separated by commas, blanks around them left out."""
    return [name for part in text.split(",") if (name := part.strip())]


def parse_pins(texts: Sequence[str]) -> dict[str, int | tuple[WeightBits, int | None]]:
    """Patterns and their bits, such as ``conv1=8`` or ``layer1.*=4/8``; ``none`` for an input that stays float.

    Raises:
        ValueError: One is nothing of the kind, or a pattern is there twice.
    """
    pins: dict[str, int | tuple[WeightBits, int | None]] = {}
    for text in texts:
        pattern, _, bits = (part.strip() for part in text.rpartition("="))
        match = re.fullmatch(r"(\d+)|(\w+)\s*/\s*(\d+|none)", bits)
        if not pattern or match is None:
            raise ValueError(
                f"--pin: {text!r} is not a pattern with bits such as conv1=8, 'layer1.*=4/8' (weight/input) or "
                f"fc=fp8/none"
            )
        if pattern in pins:
            raise ValueError(f"--pin: {pattern!r} is there twice")
        both, weight, act = match.groups()
        if both is None:
            pins[pattern] = int(weight) if weight.isdigit() else weight, None if act == "none" else int(act)
        else:
            pins[pattern] = int(both)
    return pins


def parse_group(text: str) -> Group:
    """Layers that share bits, such as ``conv1,conv2``, or ``conv1,conv2=act`` for one side alone.

    Raises:
        ValueError: It is nothing of the kind.
    """
    names, _, share = text.partition("=")
    try:
        return Group(split_names(names), share.strip() or "both")
    except ValueError as error:
        raise ValueError(f"--group: {text!r}: {error}") from None


def parse_uniform(text: str) -> tuple[int, int]:
    """Weight and activation bits such as ``w4a4``.

    Raises:
        ValueError: It is nothing of the kind.
    """
    match = re.fullmatch(r"w([2-8])a([2-8])", text)
    if match is None:
        raise ValueError(f"--compare: {text!r} is not a uniform policy such as w4a4, with 2 to 8 bits")
    return int(match[1]), int(match[2])


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        raise ValueError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
