"""``asga demo``: the whole line on data that need no download, in a few minutes on two cores."""

import argparse

from asga.cli.console import Console
from asga.cli.options import add_run_options, check_at_least_one, model_factory, recorded, validation_batches
from asga.cli.pipeline import (
    Setting,
    finish_run,
    float_model,
    searched,
    show_table,
    table_row,
    transferred,
)
from asga.cli.search import describe, example_inputs, findings
from asga.data import Batches, open_dataset
from asga.runs import RunFolder
from asga.search import Budget, PolicySearcher
from asga.search.result import SearchResult

HELP = "search on half of the classes of the embedded digits, transfer to all of them"

_BUDGET = Budget(bitops="w4a4")
_MODEL = "resnet20"
# The proxy: a sixth of the 1,438 training images, of half of the classes, as they are (8x8). The target: all ten
# classes at twice the resolution, augmented.
_PROXY_IMAGES, _PROXY_CLASSES, _PROXY_BATCH = 240, 5, 48
_TARGET_SIDE, _TARGET_BATCH = 16, 64
# The proxy model is left with some loss: one that has none left tells candidates apart no more. The others train for
# as long as five minutes for three seeds allow.
_PROXY_FLOAT_EPOCHS, _SEARCH_EPOCHS, _TARGET_FLOAT_EPOCHS, _TRANSFER_EPOCHS = 10, 20, 12, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--seeds", type=int, default=3, help="repeat everything this many times")
    add_run_options(parser, out="runs/demo")


def run(options: argparse.Namespace) -> None:
    """Search, transfer, compare with uniform 4 bits and with float."""
    check_at_least_one(options, "seeds")
    with Console() as console:
        folder = RunFolder(options.out, "demo", recorded(options), resume=options.resume)
        records: dict[str, list] = {"float": [], "uniform": [], "searched": []}
        for seed in range(options.seeds):
            proxy, target = _settings(folder, console, seed)
            result, search_seconds = _search(proxy, seed)
            build = model_factory(_MODEL, target.train, "cpu")
            model, record = float_model(
                target, build, epochs=_TARGET_FLOAT_EPOCHS, seed=seed, stage=f"target-float/seed{seed}"
            )
            records["float"].append(record)
            for name, policy in (("uniform", result.choices.uniform(4, 4)), ("searched", result.policy)):
                stage = f"{name}/seed{seed}"
                _, record = transferred(
                    target, model, policy, epochs=_TRANSFER_EPOCHS, method="asga", stage=stage, seed=seed
                )
                records[name].append({**record, "search_seconds": search_seconds})

        uniform = result.choices.uniform(4, 4)
        limit = _BUDGET.limits(result.profiles, result.choices)["bitops"]
        table = [table_row("float", records["float"], bits="32/32")]
        for name, policy, bits in (("uniform w4a4", uniform, "4/4"), ("searched", result.policy, "mixed")):
            costs, found = result.costs(policy), records[name.partition(" ")[0]]
            table.append(table_row(name, found, bits=bits, costs=costs, bitops_share=costs.bitops / limit))
        searching = [record["search_seconds"] for record in records["searched"]]
        title = (
            f"digits, {_MODEL}: top-1 on all ten classes at {_TARGET_SIDE}x{_TARGET_SIDE} over {options.seeds} seeds"
        )
        show_table(console, title, table)
        for line in describe(result):
            console.note(line)
        note = (
            f"search: {sum(searching) / len(searching):.0f} s on {_PROXY_IMAGES} images of {_PROXY_CLASSES} classes "
            f"at 8x8. Each seed searches its own policy; bits and costs shown are those of the last one."
        )
        console.note(note)
        seconds = folder.seconds()
        summary = {"command": "demo", "seconds": seconds, "table": table, "notes": [note], **findings(result)}
        finish_run(folder, summary, result.policy, console)


def _settings(folder: RunFolder, console: Console, seed: int) -> tuple[Setting, Setting]:
    small = open_dataset("digits", "train", limit=_PROXY_IMAGES, classes=_PROXY_CLASSES, seed=seed)
    small_val = open_dataset("digits", "val", classes=_PROXY_CLASSES)
    proxy = Batches(small, _PROXY_BATCH, shuffle=True, augment=True, seed=seed)
    large = open_dataset("digits", "train", image_size=_TARGET_SIDE)
    large_val = open_dataset("digits", "val", image_size=_TARGET_SIDE)
    target = Batches(large, _TARGET_BATCH, shuffle=True, augment=True, seed=seed)
    return (
        Setting(folder, console, proxy, validation_batches(small_val, "cpu", mean=proxy.mean, std=proxy.std), None),
        Setting(folder, console, target, validation_batches(large_val, "cpu", mean=target.mean, std=target.std), None),
    )


def _search(proxy: Setting, seed: int) -> tuple[SearchResult, float]:
    stage = f"search/seed{seed}"

    def searcher() -> PolicySearcher:
        build = model_factory(_MODEL, proxy.train, "cpu")
        model, _ = float_model(proxy, build, epochs=_PROXY_FLOAT_EPOCHS, seed=seed, stage=f"proxy-float/seed{seed}")
        return PolicySearcher(
            model,
            budget=_BUDGET,
            epochs=_SEARCH_EPOCHS,
            example_inputs=example_inputs(proxy.train, _TARGET_SIDE),
            folder=proxy.folder,
            progress=proxy.console.progress,
            stage=stage,
            meta={"architecture": _MODEL, "proxy": "digits", "method": "asga"},
        )

    return searched(proxy, searcher, stage=stage, seed=seed, path=proxy.folder.path / f"search-seed{seed}.json")
