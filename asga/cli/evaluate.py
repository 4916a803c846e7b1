"""``asga evaluate``: measure the model of a transfer run again."""

import argparse
from pathlib import Path

from asga._files import read_json
from asga.cli.console import Console
from asga.cli.options import autocast_dtype, load_weights, model_factory, open_split, validation_batches
from asga.convert import quantize
from asga.policy import Policy
from asga.steps import evaluate

HELP = "evaluate the model of a transfer run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("folder", metavar="RUN", help="folder of a transfer run")
    parser.add_argument("--data", help="default: the data it was trained on")
    parser.add_argument("--device", help="default: the one it was trained on")


def run(options: argparse.Namespace) -> None:
    """Load, evaluate and print."""
    folder = Path(options.folder)
    trained = _trained(folder)
    trained.data = options.data or trained.data
    trained.device = options.device or trained.device
    normalization = _normalization(folder)
    policy = Policy.load(folder / "policy.json")
    with Console() as console:
        images = open_split(trained, "val", console)
        val = validation_batches(images, trained.device, **normalization)
        build = model_factory(trained.model or policy.meta["architecture"], val, trained.device)
        model = quantize(build(trained.seed), policy)
        load_weights(model, str(folder / "model.pt"))
        found = evaluate(model, val, autocast=autocast_dtype(trained))
        console.note(f"top-1 {found.top1:.2%}, loss {found.loss:.4f}, {found.images} images of {trained.data}")


def _trained(folder: Path) -> argparse.Namespace:
    """The options that the model was trained with."""
    path = folder / "config.json"
    try:
        config = read_json(path)
        command, trained = config["command"], argparse.Namespace(**config["options"])
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no run (config.json is missing)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error!r}") from None
    if command != "transfer":
        raise ValueError(f"{folder} holds a run of 'asga {command}'; one of 'asga transfer' is needed")
    return trained


def _normalization(folder: Path) -> dict[str, list[float]]:
    """Mean and standard deviation of the training images: the model knows no other inputs."""
    path = folder / "result.json"
    try:
        found = read_json(path)["normalization"]
        return {"mean": found["mean"], "std": found["std"]}
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds a run that is not finished (result.json is missing)") from None
    except (KeyError, TypeError):
        raise ValueError(f"{path} does not say how images were normalized: an older asga wrote it") from None
