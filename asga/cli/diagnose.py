"""``asga diagnose``: whether the proxy says what the target says, and which layers a policy starves there."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict

from torch import nn

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
from asga.policy import LayerPolicy, Policy, WeightBits, bit_width, check_weight_bits
from asga.runs import RunFolder
from asga.search import SearchSpace, gradient_sensitivity, hessian_sensitivity, measured_sensitivity
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--policy", required=True, metavar="FILE", help="policy.json of a search")
    parser.add_argument("--model", help="default: the architecture that the policy names")
    parser.add_argument("--proxy", metavar="DATA", help="like --data: what the policy was searched on")
    parser.add_argument("--proxy-limit", type=int, help="like --limit, of the proxy")
    parser.add_argument("--proxy-init", metavar="FILE", help="like --init, of the proxy")
    described = "; ".join(f"{name}: {what}" for name, what in _SCORES.items())
    parser.add_argument("--score", choices=tuple(_SCORES), default="gradient", help=f"of sensitivity; {described}")
    parser.add_argument("--batches", type=int, default=8, help="of training images that sensitivities are measured on")
    parser.add_argument("--weight-bits", default="2,3,4,6,8", help="candidates, besides those of the policy")
    parser.add_argument("--act-bits", default="2,3,4,6,8", help="candidates, besides those of the policy")
    add_data_options(parser)
    add_float_options(parser, float_epochs=15)
    add_run_options(parser, out="runs/diagnose")


def run(options: argparse.Namespace) -> None:
    """Measure sensitivities, compare, write the run folder."""
    policy, architecture = load_policy(options)
    if options.proxy is None and (options.proxy_limit is not None or options.proxy_init is not None):
        raise ValueError("--proxy-limit and --proxy-init say more about a proxy: --proxy is needed")
    check_at_least_one(options, "batches", "float_epochs")
    space = _space(policy, options)
    with Console() as console:
        sides = {"target": options}
        if options.proxy is not None:
            own = {"data": options.proxy, "limit": options.proxy_limit, "init": options.proxy_init}
            sides["proxy"] = argparse.Namespace(**{**vars(options), **own})
        batches = {side: open_batches(of_side, console) for side, of_side in sides.items()}
        build = {side: model_factory(architecture, train, options.device) for side, (train, _) in batches.items()}
        models = {side: build[side](options.seed) for side in sides}
        policy.check_against(list(find_quantizable(models["target"])[0]))
        choices = space.choices(models["target"])
        example = example_inputs(batches["target"][0], None).to(options.device)
        profiles = profile_layers(models["target"], example, choices.names, unused=choices.excluded)
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

        found = _findings(policy, choices, profiles, increases)
        for line in _describe(found):
            console.note(line)
        if "rank_correlations" in found:
            console.table("rank correlation of proxy and target", _table(found["rank_correlations"]))
        finish_run(folder, {"command": "diagnose", "seconds": folder.seconds(), **found}, policy, console)


def _space(policy: Policy, options: argparse.Namespace) -> SearchSpace:
    """All layers with the same candidates, the choices of the policy among them; what it leaves float is left out."""
    weights = {check_weight_bits("--weight-bits", bits) for bits in parse_bits(options.weight_bits) or ()}
    acts = set(parse_bits(options.act_bits) or ())
    weights |= {layer.weight_bits for layer in policy.values()} - {None}
    acts |= {layer.act_bits for layer in policy.values()} - {None}
    stays_float = [name for name, layer in policy.items() if layer == LayerPolicy(None, None)]
    return SearchSpace(weight_bits=tuple(weights), act_bits=tuple(acts) or None, first_last=None, exclude=stays_float)


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
) -> dict[str, object]:
    """What ``result.json`` says."""
    costs = policy_costs(profiles, policy).to_dict()
    # The latency is not known here: its table was given to the search.
    limits = {metric: costs[metric] for metric in policy.meta.get("limits", ()) if metric in costs}
    limits = limits or {"bitops": costs["bitops"]}
    # As where uniform policies are compared: first and last layer are seldom searched.
    kept = {name: policy[name] for name in (choices.names[0], choices.names[-1]) if name in choices.layers}
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


def _table(correlations: list[dict[str, object]]) -> list[dict[str, str]]:
    """Rows for the console: a bit-width each."""
    rows: dict[WeightBits, dict[str, str]] = {}
    for one in correlations:
        shown = "" if one["rho"] is None else f"{one['rho']:.2f}"
        if one["interval"] is not None:
            shown += " ({:.2f} to {:.2f})".format(*one["interval"])
        rows.setdefault(one["bits"], {"bits": str(one["bits"]), "weight": "", "act": ""})[one["kind"]] = shown
    return [rows[bits] for bits in sorted(rows, key=bit_width)]
