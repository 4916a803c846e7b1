"""``asga diagnose``: whether the proxy says what the target says, and which layers a policy starves there."""

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from asga._files import read_json
from asga.cli.console import Console
from asga.cli.options import (
    add_data_options,
    add_float_options,
    add_run_options,
    autocast_dtype,
    check_at_least_one,
    data_name,
    load_policy,
    load_weights,
    model_factory,
    open_batches,
    parse_bits,
    recorded,
)
from asga.cli.pipeline import Setting, finish_run, float_model
from asga.cli.search import example_inputs
from asga.convert import find_quantizable
from asga.nn.quantizable import second_names
from asga.policy import LayerPolicy, Policy, WeightBits, bit_width, check_weight_bits
from asga.runs import RunFolder
from asga.search import SearchResult, SearchSpace, gradient_sensitivity, hessian_sensitivity, measured_sensitivity
from asga.search.costs import policy_costs
from asga.search.diagnosis import (
    Increases,
    by_candidate,
    least_increase,
    rank_correlations,
    starved,
    total_increase,
)
from asga.search.profiles import LayerProfile, profile_layers
from asga.search.space import SpaceChoices
from asga.training import first_batches

HELP = "compare sensitivities on proxy and target, and a policy with them"

_SCORES = {
    "gradient": "from gradients, a few passes",
    "hessian": "from traces of the Hessian, some tens of passes",
    "measured": "the loss with one tensor quantized, hundreds of passes",
}
_SHOWN = 5
_BITS = "2,3,4,6,8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--policy", required=True, metavar="FILE", help="policy.json of a search")
    parser.add_argument(
        "--search",
        metavar="FILE",
        help="search.json of the search that the policy comes from: its candidates, pins, groups, target and latencies "
        "count; default: the one beside the policy",
    )
    parser.add_argument("--model", help="default: the architecture that the policy names")
    parser.add_argument("--proxy", metavar="DATA", help="like --data: what the policy was searched on")
    parser.add_argument("--proxy-limit", type=int, help="like --limit, of the proxy")
    parser.add_argument("--proxy-init", metavar="FILE", help="like --init, of the proxy")
    described = "; ".join(f"{name}: {what}" for name, what in _SCORES.items())
    parser.add_argument("--score", choices=tuple(_SCORES), default="gradient", help=f"of sensitivity; {described}")
    parser.add_argument("--batches", type=int, default=8, help="of training images that sensitivities are measured on")
    candidates = f"candidates, besides those of the policy; default: those of the search, or {_BITS} for any target"
    parser.add_argument("--weight-bits", help=candidates)
    parser.add_argument("--act-bits", help=f"{candidates}; none: only those of the policy")
    add_data_options(parser)
    add_float_options(parser, float_epochs=15)
    add_run_options(parser, out="runs/diagnose")


def run(options: argparse.Namespace) -> None:
    """Measure sensitivities, compare, write the run folder."""
    policy, architecture = load_policy(options)
    if options.proxy is None and (options.proxy_limit is not None or options.proxy_init is not None):
        raise ValueError("--proxy-limit and --proxy-init say more about a proxy: --proxy is needed")
    check_at_least_one(options, "batches", "float_epochs")
    search = _search_of(policy, options)
    space = _space(policy, options, search)
    with Console() as console:
        sides = {"target": options}
        if options.proxy is not None:
            own = {"data": options.proxy, "limit": options.proxy_limit, "init": options.proxy_init}
            sides["proxy"] = argparse.Namespace(**{**vars(options), **own})
        batches = {side: open_batches(of_side, console) for side, of_side in sides.items()}
        build = {side: model_factory(architecture, train, options.device) for side, (train, _) in batches.items()}
        models = {side: build[side](options.seed) for side in sides}
        policy.check_against(list(find_quantizable(models["target"])[0]), second_names(models["target"]))
        choices = space.choices(models["target"])
        example = example_inputs(batches["target"][0], None).to(options.device)
        profiles = profile_layers(models["target"], example, choices.names, unused=choices.excluded)
        if search is not None:  # a table of latencies was made for the device, whatever the data
            times = {name: profile.latency_ns for name, profile in search.profiles.items()}
            profiles = {name: replace(profile, latency_ns=times[name]) for name, profile in profiles.items()}
        for side, of_side in sides.items():
            if of_side.init is not None:
                load_weights(models[side], of_side.init)

        folder = RunFolder(options.out, "diagnose", recorded(options), resume=options.resume)
        increases = {}
        for side, of_side in sides.items():
            setting = Setting(folder, console, *batches[side], autocast_dtype(options))
            if of_side.init is None:
                models[side], _ = float_model(
                    setting, build[side], epochs=options.float_epochs, seed=options.seed, stage=f"{side}-float"
                )
            console.note(f"{options.score} sensitivities on {data_name(of_side.data)}")
            increases[side] = _sensitivity(options.score, models[side], space, setting, options.batches)

        found = _findings(policy, choices, profiles, increases, searched=search is not None)
        notes = _missing(policy, options, search)
        for line in (*_describe(found), *notes):
            console.note(line)
        if "rank_correlations" in found:
            console.table("rank correlation of proxy and target", _table(found["rank_correlations"]))
        summary = {"command": "diagnose", "seconds": folder.seconds(), **found, "notes": notes}
        finish_run(folder, summary, policy, console)


def _search_of(policy: Policy, options: argparse.Namespace) -> SearchResult | None:
    """The search whose space the policy is of: that of --search, or else the one beside the policy, if it is."""
    path = _beside(options, "search.json") if options.search is None else Path(options.search)
    if options.search is None and not path.is_file():
        return None
    search = SearchResult.load(path)
    names, layers = search.choices.names, search.choices.layers
    of_its_space = set(policy) == set(names) and all(
        bits.weight_bits in layers[name].weight_bits and bits.act_bits in layers[name].act_bits
        if name in layers
        else bits == LayerPolicy(None, None)
        for name, bits in policy.items()
    )
    if options.search is not None and not of_its_space:
        raise ValueError(f"--search: the policy {options.policy} is not of the search space of {path}")
    return search if of_its_space else None


def _space(policy: Policy, options: argparse.Namespace, search: SearchResult | None) -> SearchSpace:
    """That of the search, with other candidates if they are given.

    Without a search, all layers with the same candidates, the choices of the policy among them, for the target that it
    names; what it leaves float is left out.
    """
    given = {side: getattr(options, f"{side}_bits") for side in ("weight", "act")}
    if search is None:
        target = policy.meta.get("deployment_target", "any")
        usual = _BITS if target == "any" else "none"  # a target hardly runs them all
        given = {side: usual if text is None else text for side, text in given.items()}
        layers, excluded = list(policy), [name for name, bits in policy.items() if bits == LayerPolicy(None, None)]
        pinned, groups = {}, ()
    else:
        choices = search.choices
        layers = [name for name, layer in choices.layers.items() if not layer.pinned]
        excluded, groups, target = choices.excluded, choices.groups, choices.target
        pinned = {name: (c.weight_bits[0], c.act_bits[0]) for name, c in choices.layers.items() if c.pinned}
    bits = {}
    for side, text in given.items():
        if text is None:  # all searched layers have the same
            bits[side] = set(getattr(search.choices.layers[layers[0]], f"{side}_bits")) - {None}
        else:
            own = {getattr(policy[name], f"{side}_bits") for name in layers} - {None}
            bits[side] = own | {check_weight_bits(f"--{side}-bits", one) for one in parse_bits(text) or ()}
    return SearchSpace(
        weight_bits=tuple(bits["weight"]),
        act_bits=tuple(bits["act"]) or None,
        first_last=None,
        pinned=pinned,
        exclude=excluded,
        target=target,
        groups=groups,
    )


def _sensitivity(score: str, model: nn.Module, space: SearchSpace, setting: Setting, batches: int) -> Increases:
    images = first_batches(setting.train, batches)
    if score == "hessian":
        return hessian_sensitivity(model, space, images)
    measure = gradient_sensitivity if score == "gradient" else measured_sensitivity
    return measure(model, space, images, autocast=setting.autocast)


def _findings(
    policy: Policy,
    choices: SpaceChoices,
    profiles: Mapping[str, LayerProfile],
    increases: Mapping[str, Increases],
    *,
    searched: bool,
) -> dict[str, object]:
    """What ``result.json`` says; `searched`: the choices are those of the search."""
    costs = policy_costs(profiles, policy).to_dict()
    # Without its search a policy's latency is not known: the table was given to the search.
    limits = {metric: costs[metric] for metric in policy.meta.get("limits", ()) if metric in costs}
    limits = limits or {"bitops": costs["bitops"]}
    # What was pinned is not known without the search: first and last layer are seldom searched.
    ends = () if searched else (choices.names[0], choices.names[-1])
    kept = {name: policy[name] for name in ends if name in choices.layers}
    best = {side: least_increase(of_side, choices, profiles, limits, kept) for side, of_side in increases.items()}
    target = increases["target"]
    policies = {"policy": policy, **{f"best by the {side}'s sensitivities": found for side, found in best.items()}}
    found = {
        "sensitivities": by_candidate(target, choices),
        "increase_on_target": {name: total_increase(target, choices, other) for name, other in policies.items()},
        "starved": [asdict(one) for one in starved(target, choices, policy, best["target"])],
    }
    if "proxy" in increases:
        found["proxy_sensitivities"] = by_candidate(increases["proxy"], choices)
        found["rank_correlations"] = [asdict(one) for one in rank_correlations(increases["proxy"], target, choices)]
    return found


def _describe(found: Mapping[str, object]) -> list[str]:
    """The same in sentences."""
    lines = ["estimated increase of the loss on the target, before training, at the cost of the policy:"]
    lines += [f"  {name}: {increase:.4g}" for name, increase in found["increase_on_target"].items()]
    if found["starved"]:
        lines.append(f"fewer bits than the target's sensitivities would give: {len(found['starved'])} tensors, first")
    for one in found["starved"][:_SHOWN]:
        lines.append(
            f"  {one['layer']}, {one['kind']}: {one['bits']} instead of {one['wanted']}, {one['increase']:+.2g}"
        )
    return lines


def _missing(policy: Policy, options: argparse.Namespace, search: SearchResult | None) -> list[str]:
    """What could not be said, and how to get it."""
    lines = []
    if search is None:
        unknown = "candidates, pins and groups of the search"
        if "latency_ns" in policy.meta.get("limits", ()):
            unknown = f"{unknown}, and its latencies,"
        lines.append(
            f"{unknown} are not known, as no search.json of this policy lies beside it: other policies could give any "
            f"layer but the first and the last any candidate. Give --search RUN/search.json"
        )
    if options.proxy is None:
        found = f"the proxy, {policy.meta['proxy']}," if "proxy" in policy.meta else "the proxy"
        given = "--proxy DATA"
        if search is not None and options.search is None and (config := _beside(options, "config.json")).is_file():
            searching = read_json(config).get("options", {})
            limit, init = searching.get("limit"), searching.get("init") or str(_beside(options, "float.pt"))
            given = f"--proxy {shlex.quote(searching.get('data', 'DATA'))}"
            given += "" if limit is None else f" --proxy-limit {limit}"
            given += f" --proxy-init {shlex.quote(init)}" if Path(init).is_file() else ""
        lines.append(
            f"whether {found} orders the layers like the target is not known: the rank correlation needs sensitivities "
            f"there, too. Give {given}"
        )
    return lines


def _beside(options: argparse.Namespace, name: str) -> Path:
    return Path(options.policy).parent / name


def _table(correlations: list[dict[str, object]]) -> list[dict[str, str]]:
    """Rows for the console: a bit-width each."""
    rows: dict[WeightBits, dict[str, str]] = {}
    for one in correlations:
        shown = "" if one["rho"] is None else f"{one['rho']:.2f}"
        if one["interval"] is not None:
            shown += " ({:.2f} to {:.2f})".format(*one["interval"])
        rows.setdefault(one["bits"], {"bits": str(one["bits"]), "weight": "", "act": ""})[one["kind"]] = shown
    return [rows[bits] for bits in sorted(rows, key=bit_width)]
