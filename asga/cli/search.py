"""``asga search``: find a bit-width policy on a proxy dataset."""

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial

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
    parse_group,
    parse_pins,
    recorded,
    split_names,
)
from asga.cli.pipeline import Setting, compared, finish_run, float_model, searched
from asga.data import Batches
from asga.runs import RunFolder
from asga.search import (
    METHODS,
    Agreement,
    LatencyTable,
    PolicySearcher,
    SearchResult,
    SearchSpace,
    consensus,
    gradient_sensitivity,
    policy_agreement,
    searched_choices,
)
from asga.search.diagnosis import by_candidate
from asga.search.relaxation import RELAXATIONS
from asga.search.result import TOSS_UP
from asga.targets import TARGETS
from asga.training import CHECKPOINT_EVERY, first_batches

# For the report: few, since a batch takes as long as about five steps of a search.
_SENSITIVITY_BATCHES = 4

HELP = "search a bit-width policy on a small dataset"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--model", required=True, help="resnet20, resnet18, mobilenet_v2 or package.module:factory")
    parser.add_argument(
        "--budget",
        required=True,
        help="what the policy may cost: bitops=w4a4, or bitops=1.2G,size=1.5MB,act_memory=64kB,latency=5ms",
    )
    parser.add_argument("--latency-table", metavar="FILE", help="CSV of layer times, for a limit on the latency")
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="search this many times, with the images in other orders, from one float model; policy.json is then the "
        "policy that all searches together find likeliest",
    )
    parser.add_argument(
        "--target-size",
        type=int,
        metavar="SIDE",
        help="height and width, in pixels, of the images that the model is meant for: BitOps and activation memory are "
        "counted there, the search itself sees the proxy's as they are; default: those of the proxy",
    )
    space = parser.add_argument_group("search space")
    space.add_argument("--weight-bits", help="candidates; default: 2,3,4,6,8")
    space.add_argument("--act-bits", help="candidates; default: 2,3,4,6,8; none: inputs stay float")
    space.add_argument("--formats", help="candidates by name for both: int2 to int8; for weights also fp4, fp8")
    space.add_argument("--target", default="any", help=f"where the model will run: any, {', '.join(TARGETS)}")
    space.add_argument("--first-last", type=int, default=8, help="bits of the first and last layer; 0: searched too")
    space.add_argument(
        "--pin",
        action="append",
        metavar="PATTERN=BITS",
        help="bits of layers that are not searched, by name or pattern: conv1=8, or 'layer1.*=4/8' for weight and "
        "input, none for an input that stays float; may be repeated: the last one that matches a layer counts",
    )
    space.add_argument(
        "--exclude", action="append", metavar="PATTERN", help="layers that stay float, by name or pattern; repeatable"
    )
    space.add_argument("--groups", default="", help="rules for layers that share bits: residual,qkv,depthwise")
    space.add_argument(
        "--group",
        action="append",
        metavar="NAMES[=SHARE]",
        help="layers that share bits, by names or patterns: conv1,conv2, or conv1,conv2=act for those of their inputs "
        "alone (weight: of their weights); may be repeated",
    )
    add_data_options(parser)
    add_training_options(parser, methods=METHODS, epochs=5, float_epochs=15)
    parser.add_argument(
        "--held-out",
        type=float,
        metavar="SHARE",
        help="train the logits on this share of the images, weights on the rest",
    )
    parser.add_argument(
        "--relaxation", choices=RELAXATIONS, default="gumbel", help="gumbel: sample the candidates; softmax: mix them"
    )
    group = add_run_options(parser, out="runs/search")
    group.add_argument(
        "--checkpoint-every", type=int, default=CHECKPOINT_EVERY, metavar="STEPS", help="what a kill costs at most"
    )


def run(options: argparse.Namespace) -> None:
    """Search and write the run folder."""
    check_at_least_one(options, "epochs", "float_epochs", "target_size", "seeds", "checkpoint_every")
    budget = parse_budget(options.budget)
    given = {name: getattr(options, name) for name in ("weight_bits", "act_bits", "formats")}
    candidates = {name: parse_bits(text) for name, text in given.items() if text is not None}
    space = SearchSpace(
        **candidates,
        first_last=options.first_last or None,
        pinned=parse_pins(options.pin or ()),
        exclude=options.exclude or (),
        target=options.target,
        groups=[*split_names(options.groups), *map(parse_group, options.group or ())],
    )
    latency_table = None if options.latency_table is None else LatencyTable.from_csv(options.latency_table)
    with Console() as console:
        train, val = open_batches(options, console)
        build = model_factory(options.model, train, options.device)

        def searcher(model: nn.Module, folder: RunFolder | None, stage: str) -> PolicySearcher:
            return PolicySearcher(
                model,
                space,
                budget=budget,
                epochs=options.epochs,
                method=options.method,
                relaxation=options.relaxation,
                held_out=options.held_out,
                example_inputs=example_inputs(train, options.target_size),
                latency_table=latency_table,
                autocast=autocast_dtype(options),
                checkpoint_every=options.checkpoint_every,
                folder=folder,
                progress=console.progress,
                stage=stage,
                meta={"architecture": options.model, "proxy": data_name(options.data), "method": options.method},
            )

        model = build(options.seed)
        checked = searcher(model, None, "search")
        checked.check(train)  # complain before anything is written or trained
        if options.init is not None:
            load_weights(model, options.init)
        folder = RunFolder(options.out, "search", recorded(options), resume=options.resume)
        setting = Setting(folder, console, train, val, autocast_dtype(options), options.checkpoint_every)
        if options.init is None:
            model, _ = float_model(setting, build, epochs=options.float_epochs, seed=options.seed)
        batches = first_batches(train, _SENSITIVITY_BATCHES)
        increases = gradient_sensitivity(model, checked.choices, batches, autocast=setting.autocast)
        results, seconds = {}, 0.0
        for seed in range(options.seed, options.seed + options.seeds):
            name, several = f"seed{seed}", options.seeds > 1
            stage = f"search/{name}"
            path = folder.path / (f"search-{name}.json" if several else "search.json")
            run_search = partial(searcher, model, folder, stage)
            results[name], took = searched(setting, run_search, stage=stage, seed=seed, path=path)
            seconds += took
            if several:
                results[name].policy.save(folder.path / f"policy-{name}.json")
        result = results[name]
        if len(results) > 1:
            result = consensus(list(results.values()))
            run_search = partial(searcher, model, None, "comparison")
            result = replace(result, uniform=compared(setting, run_search, result.policy, seed=options.seed))
        result.save(folder.path / "search.json")
        console.note(str(result.policy))
        times = {"seconds": folder.seconds(), "search_seconds": seconds}
        summary = {
            "command": "search",
            **times,
            **findings(result),
            **findings_of_seeds(results),
            "sensitivities": by_candidate(increases, result.choices),
        }
        for line in (*describe(result), *describe_seeds(results)):
            console.note(line)
        finish_run(folder, summary, result.policy, console)


def example_inputs(batches: Batches, side: int | None) -> torch.Tensor:
    """One image of the size that costs are to be counted at."""
    channels, height, width = batches.dataset.image_shape
    return torch.zeros(1, channels, side or height, side or width)


def findings(result: SearchResult) -> dict[str, object]:
    """What ``result.json`` says about a search."""
    shares = {
        "expected": result.expected_cost,
        "most_likely": result.cost_shares(result.most_likely()),
        "policy": result.cost_shares(result.policy),
    }
    if "likeliest_costs" in result.policy.meta:
        limits = result.budget.limits(result.profiles, result.choices)
        costs = result.policy.meta["likeliest_costs"]
        shares["likeliest"] = {metric: costs[metric] / limit for metric, limit in limits.items()}
    decisions = [list(decision) for decision in result.choices.decisions]
    found: dict[str, object] = {"method": result.method, "cost_shares": shares, "decisions": decisions}
    if result.uniform is not None:
        found["uniform"] = result.uniform.to_dict()
    if not result.trained:  # scores are no probabilities: their gaps say nothing about toss-ups
        return found
    gaps = result.gaps()
    toss_ups = sum(gap < TOSS_UP for layer in gaps.values() for gap in layer.values())
    return {
        **found,
        "logit_gaps": gaps,
        "toss_ups": toss_ups,
        "choices": sum(len(layer) for layer in gaps.values()),
    }


def describe(result: SearchResult) -> list[str]:
    """The same in sentences."""
    found = findings(result)
    shares = found["cost_shares"]
    lines = []
    for metric, share in shares["policy"].items():
        others = {
            "before bits were raised": shares.get("likeliest", {}),
            "expected at the end": shares["expected"],
            "likeliest candidates": shares["most_likely"],
        }
        known = ", ".join(f"{name} {of[metric]:.1%}" for name, of in others.items() if metric in of)
        lines.append(f"{metric}: policy {share:.1%} of the budget ({known})")
    if found.get("toss_ups"):
        lines.append(f"{found['toss_ups']} of {found['choices']} choices were toss-ups (gap below {TOSS_UP})")
    if result.uniform is not None:
        whose = "of all seeds together " if "seeds" in result.policy.meta else ""
        lines.append(f"the policy {whose}is {result.uniform.verdict}: {result.uniform}")
    return lines


def findings_of_seeds(results: Mapping[str, SearchResult]) -> dict[str, object]:
    """What ``result.json`` says about several searches; nothing about one."""
    if len(results) == 1:
        return {}
    agreement = _agreement(results)
    return {
        "agreement": {"choices": agreement.choices, "unanimous": agreement.unanimous, **asdict(agreement)},
        "seeds": {name: findings(result) for name, result in results.items()},
    }


def describe_seeds(results: Mapping[str, SearchResult]) -> list[str]:
    """The same in sentences."""
    if len(results) == 1:
        return []
    found = _agreement(results)
    compared = [result.uniform for result in results.values() if result.uniform is not None]
    not_better = Counter(uniform.verdict for uniform in compared if uniform.better is False)
    return [
        *(f"policies of single seeds: {n} of {len(compared)} {verdict}" for verdict, n in not_better.items()),
        f"{len(results)} seeds: two of them agree on {found.equal:.1%} of {found.choices} choices, all of them on "
        f"{found.unanimous}; chance would give {found.chance:.1%} (p = {found.p_value:.2g})",
    ]


def _agreement(results: Mapping[str, SearchResult]) -> Agreement:
    policies = {name: result.policy for name, result in results.items()}
    return policy_agreement(policies, searched_choices(next(iter(results.values())).choices) or None)
