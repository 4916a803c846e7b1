"""``asga evaluate``: measure the model of a transfer run again."""

import argparse
import json
from pathlib import Path

from asga.cli.console import Console
from asga.cli.options import autocast_dtype, load_weights, model_factory, open_batches
from asga.convert import quantize
from asga.policy import Policy
from asga.training import evaluate

HELP = "evaluate the model of a transfer run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("folder", metavar="RUN", help="folder of a transfer run")
    parser.add_argument("--data", help="default: the data it was trained on")
    parser.add_argument("--device", help="default: the one it was trained on")


def run(options: argparse.Namespace) -> None:
    """Load, evaluate and print."""
    folder = Path(options.folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        command, trained = config["command"], argparse.Namespace(**config["options"])
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no run (config.json is missing)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not the configuration of a run: {error!r}") from None
    if command != "transfer":
        raise ValueError(f"{folder} holds a run of 'asga {command}'; one of 'asga transfer' is needed")
    trained.data = options.data or trained.data
    trained.device = options.device or trained.device
    policy = Policy.load(folder / "policy.json")
    with Console() as console:
        train, val = open_batches(trained, console)
        build = model_factory(trained.model or policy.meta["architecture"], train, trained.device)
        model = quantize(build(trained.seed), policy)
        load_weights(model, str(folder / "model.pt"))
        found = evaluate(model, val, autocast=autocast_dtype(trained))
        console.note(f"top-1 {found.top1:.2%}, loss {found.loss:.4f}, {found.images} images of {trained.data}")
