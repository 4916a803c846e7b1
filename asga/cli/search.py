"""``asga search``: find a bit-width policy on a proxy dataset."""

import argparse

import torch
from torch import nn

from asga.cli.console import Console
from asga.cli.options import (
    add_data_options,
    add_run_options,
    add_training_options,
    autocast_dtype,
    check_at_least_one,
    data_name,
    load_weights,
    model_factory,
    open_batches,
    parse_bits,
    parse_budget,
    recorded,
)
from asga.cli.pipeline import Setting, finish_run, float_model, training_seconds
from asga.data import Batches
from asga.runs import RunFolder
from asga.search import PolicySearcher, SearchResult, SearchSpace
from asga.search.result import TOSS_UP

HELP = "search a bit-width policy on a small dataset"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--model", required=True, help="resnet20, resnet18, mobilenet_v2 or package.module:factory")
    parser.add_argument(
        "--budget", required=True, help="what the policy may cost: bitops=w4a4, or bitops=1.2G,size=1.5MB"
    )
    parser.add_argument("--target-size", type=int, help="count BitOps at this image side instead of the proxy's")
    space = parser.add_argument_group("search space")
    space.add_argument("--weight-bits", default="2,3,4,6,8", help="candidates")
    space.add_argument("--act-bits", default="2,3,4,6,8", help="candidates")
    space.add_argument("--first-last", type=int, default=8, help="bits of the first and last layer; 0: searched too")
    add_data_options(parser)
    add_training_options(parser, epochs=5, float_epochs=15)
    add_run_options(parser, out="runs/search")


def run(options: argparse.Namespace) -> None:
    """Search and write the run folder."""
    check_at_least_one(options, "epochs", "float_epochs", "target_size")
    budget = parse_budget(options.budget)
    space = SearchSpace(
        weight_bits=parse_bits(options.weight_bits),
        act_bits=parse_bits(options.act_bits),
        first_last=options.first_last or None,
    )
    with Console() as console:
        train, val = open_batches(options, console)
        build = model_factory(options.model, train, options.device)

        def searcher(model: nn.Module, folder: RunFolder | None) -> PolicySearcher:
            return PolicySearcher(
                model,
                space,
                budget=budget,
                epochs=options.epochs,
                method=options.method,
                example_inputs=example_inputs(train, options.target_size),
                autocast=autocast_dtype(options),
                folder=folder,
                progress=console.progress,
                meta={"architecture": options.model, "proxy": data_name(options.data), "method": options.method},
            )

        model = build(options.seed)
        searcher(model, None).check(train)  # complain before anything is written or trained
        if options.init is not None:
            load_weights(model, options.init)
        folder = RunFolder(options.out, "search", recorded(options), resume=options.resume)
        if options.init is None:
            setting = Setting(folder, console, train, val, autocast_dtype(options))
            model, _ = float_model(setting, build, epochs=options.float_epochs, seed=options.seed)
        # The same random numbers whether the float model was just trained, read from a file or finished earlier.
        torch.manual_seed(options.seed)
        result = searcher(model, folder).fit(train)
        result.save(folder.path / "search.json")
        console.note(str(result.policy))
        for line in describe(result):
            console.note(line)
        summary = {"command": "search", "seconds": training_seconds(result.history), **findings(result)}
        finish_run(folder, summary, result.policy, console)


def example_inputs(batches: Batches, side: int | None) -> torch.Tensor:
    """One image of the size that costs are to be counted at."""
    channels, height, width = batches.dataset.image_shape
    return torch.zeros(1, channels, side or height, side or width)


def findings(result: SearchResult) -> dict[str, object]:
    """What ``result.json`` says about a search."""
    gaps = result.gaps()
    toss_ups = sum(gap < TOSS_UP for layer in gaps.values() for gap in layer.values())
    return {
        "logit_gaps": gaps,
        "toss_ups": toss_ups,
        "choices": sum(len(layer) for layer in gaps.values()),
        "cost_shares": {
            "expected": result.expected_cost,
            "most_likely": result.cost_shares(result.most_likely()),
            "policy": result.cost_shares(result.policy),
        },
    }


def describe(result: SearchResult) -> list[str]:
    """The same in sentences."""
    found = findings(result)
    lines = []
    for metric, share in found["cost_shares"]["policy"].items():
        expected, likely = (found["cost_shares"][key][metric] for key in ("expected", "most_likely"))
        lines.append(
            f"{metric}: policy {share:.1%} of the budget (expected at the end {expected:.1%}, "
            f"likeliest candidates {likely:.1%})"
        )
    if found["toss_ups"]:
        lines.append(f"{found['toss_ups']} of {found['choices']} choices were toss-ups (gap below {TOSS_UP})")
    return lines
