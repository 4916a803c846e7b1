"""``asga transfer``: put a policy into a model for the target dataset and fine-tune it there."""

import argparse

from asga._files import save_tensors
from asga.cli.console import Console
from asga.cli.options import (
    add_data_options,
    add_run_options,
    add_training_options,
    autocast_dtype,
    check_at_least_one,
    data_name,
    load_policy,
    load_weights,
    model_factory,
    open_batches,
    parse_uniform,
    recorded,
)
from asga.cli.pipeline import Setting, finish_run, float_model, show_table, table_row, transferred
from asga.cli.search import example_inputs
from asga.convert import check_policy, find_quantizable
from asga.policy import MAX_BITS, MIN_BITS, LayerPolicy, Policy
from asga.runs import RunFolder
from asga.search import Budget
from asga.search.costs import policy_costs
from asga.search.profiles import profile_layers
from asga.search.space import LayerChoices, SpaceChoices
from asga.steps import evaluate

HELP = "fine-tune a model with a policy on the target dataset"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--policy", required=True, metavar="FILE", help="policy.json of a search")
    parser.add_argument("--model", help="default: the architecture that the policy names")
    parser.add_argument(
        "--compare",
        nargs="*",
        default=[],
        metavar="wXaY",
        help="also fine-tune uniform policies, first and last layer as in the policy",
    )
    parser.add_argument("--seeds", type=int, default=1, help="fine-tune this many times")
    add_data_options(parser)
    methods = {"asga": "two passes a step", "sgd": "one pass a step, to compare"}
    add_training_options(parser, methods=methods, epochs=3, float_epochs=20)
    add_run_options(parser, out="runs/transfer")


def run(options: argparse.Namespace) -> None:
    """Fine-tune, evaluate and write the run folder."""
    policy, architecture = load_policy(options)
    check_at_least_one(options, "epochs", "float_epochs", "seeds")
    with Console() as console:
        train, val = open_batches(options, console)
        build = model_factory(architecture, train, options.device)
        model = build(options.seed)
        names = list(find_quantizable(model)[0])
        check_policy(model, policy)
        choices = _choices_of(policy, names)
        example = example_inputs(train, None).to(options.device)
        profiles = profile_layers(model, example, names, unused=choices.excluded)
        bitops = policy.meta.get("budget", {}).get("bitops")
        limit = None if bitops is None else Budget(bitops=bitops).limits(profiles, choices)["bitops"]
        policies = {"searched": policy}
        for word in options.compare:
            policies[f"uniform {word}"] = choices.uniform(*parse_uniform(word))
        costs = {name: policy_costs(profiles, found) for name, found in policies.items()}

        if options.init is not None:
            load_weights(model, options.init)
        folder = RunFolder(options.out, "transfer", recorded(options), resume=options.resume)
        setting = Setting(folder, console, train, val, autocast_dtype(options))
        if options.init is not None:
            found = evaluate(model, val, autocast=setting.autocast)
            record = {"top1": found.top1, "loss": found.loss, "seconds": 0.0}
        else:
            model, record = float_model(setting, build, epochs=options.float_epochs, seed=options.seed)
        table = [table_row("float", [record], bits="32/32")]
        for name, found_policy in policies.items():
            records = []
            for seed in range(options.seed, options.seed + options.seeds):
                quantized, record = transferred(
                    setting,
                    model,
                    found_policy,
                    epochs=options.epochs,
                    method=options.method,
                    stage=f"{name}/seed{seed}",
                    seed=seed,
                )
                records.append(record)
                if name == "searched" and seed == options.seed:
                    save_tensors(folder.path / "model.pt", quantized.state_dict())
            share = costs[name].bitops / limit if limit else None
            bits = "mixed" if name == "searched" else name.removeprefix("uniform ")
            table.append(table_row(name, records, bits=bits, costs=costs[name], bitops_share=share))
        show_table(console, f"{data_name(options.data)}, {architecture}", table)
        result = {
            "command": "transfer",
            "seconds": folder.seconds(),
            "table": table,
            "normalization": {"mean": train.mean, "std": train.std},
        }
        finish_run(folder, result, policy, console)


def _choices_of(policy: Policy, names: list[str]) -> SpaceChoices:
    """A space that the policy may come from: the layers pinned that it names, what it leaves float excluded.

    Policies of other origin name none: the first and the last layer are taken to be pinned, as is usual.
    """
    anything = tuple(range(MIN_BITS, MAX_BITS + 1))
    pinned = policy.meta.get("pinned", (names[0], names[-1]))
    layers = {}
    for name in names:
        bits = policy[name]
        if name in pinned:
            layers[name] = LayerChoices((bits.weight_bits,), (bits.act_bits,), pinned=True)
        elif bits != LayerPolicy(None, None):
            layers[name] = LayerChoices(anything, (None,) if bits.act_bits is None else anything)
    return SpaceChoices(layers, {}, tuple(names))
