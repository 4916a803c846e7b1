"""The methods of the searcher side by side: CIFAR-10 as proxy, Tiny-ImageNet32-100 as target.

    python -m asga.bench.transfer_study --proxy imagefolder:CIFAR10 --target imagefolder:TINY --out runs/study

A study is a grid of model x budget x method x seed. Every cell searches a policy on the proxy, from a float model that
all cells of a model share, and fine-tunes it on the target, from a float model that they share too, in an order of
images that only the seed decides: differences between two methods are paired by seed. Every policy is fine-tuned by
plain SGD, so that only the policies differ; equal policies of one seed are fine-tuned once. With ``--fine-tune-on
proxy`` the same is done where the policies were searched: a search that fails there has nothing to transfer.

A method may carry options of the searcher or of its optimizer, as in ``sgd:held_out=0.2`` or
``asga:rho_max=0.1,perturb="quantized"``, and is a row of its own then.

Cells are written as they finish; the same command goes on with what is missing. ``study.json`` in the folder has every
cell, ``study.md`` the table.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from inspect import signature
from pathlib import Path

import torch
from torch import nn

import asga
from asga._files import save_tensors, write_atomic, write_json
from asga.bench.machine import machine_facts
from asga.data import Batches, open_dataset
from asga.models import build_model
from asga.policy import Policy
from asga.search import Budget, PolicySearcher, SearchResult, policy_agreement, searched_choices
from asga.steps import evaluate
from asga.transfer import TransferTrainer

METHODS = ("sgd", "asga", "sam", "aligned", "sensitivity", "hawq", "random", "uniform")
DATA = ("target", "proxy")
SUFFIXES = {"target": "cell", "proxy": "proxy-cell"}  # of the files of cells
_BATCH = 128
# As for `asga search` and `asga transfer`; float models are trained by the recipe of asga.cli.pipeline.
_FLOAT_EPOCHS, _SEARCH_EPOCHS, _TRANSFER_EPOCHS = 15, 5, 3
_FLOAT_LR, _FLOAT_WEIGHT_DECAY = 0.1, 5e-4


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing of a study, and write its table.

    Args:
        arguments: Without the program's name; None: those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--models", nargs="+", default=["resnet20", "mobilenet_v2"])
    parser.add_argument("--budgets", nargs="+", default=["w3a3", "w2a3"], help="of BitOps")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--fine-tune-on",
        nargs="+",
        choices=DATA,
        default=["target"],
        help="proxy: what policies are worth where they were searched",
    )
    parser.add_argument("--only-search", action="store_true", help="leave the fine-tuning to a later call")
    parser.add_argument("--only-table", action="store_true", help="train nothing: the table of what is there")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.only_table:
        for model in options.models:
            Study(options, model).run()
    _summarize(options.out)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What every study asks for: the data, how much of it, the precision, and the folder."""
    parser.add_argument("--proxy", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20_000, help="images of each dataset to train on")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--total-stride",
        type=int,
        choices=(8, 32),
        default=8,
        help="of models other than resnet20: 8, for small images, or ImageNet's 32, at about a seventh of the time",
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


class Study:
    """The cells of one model.

    Args:
        options: Those of `add_data_arguments`, and for `run` those of this module's command line.
        model: Its name in `asga.models`.
    """

    def __init__(self, options: argparse.Namespace, model: str) -> None:
        self._options, self._model, self._out = options, model, options.out
        self._autocast = torch.bfloat16 if options.precision == "bfloat16" else None
        specs = {"target": options.target, "proxy": options.proxy}
        self._train = {name: _batches(spec, "train", options.limit) for name, spec in specs.items()}
        self._val = {name: _batches(spec, "val", None, like=self._train[name]) for name, spec in specs.items()}

    def run(self) -> None:
        """Search and fine-tune what is missing of the grid."""
        cells = [
            (budget, method, seed)
            for budget in self._options.budgets
            for seed in self._options.seeds
            for method in self._options.methods
        ]
        for budget, method, seed in cells:
            result = self.search(budget, method, seed)
            if not self._options.only_search:
                for data in self._options.fine_tune_on:
                    self.cell(result, budget, method, seed, data=data)
                    _summarize(self._out)

    def search(self, budget: str, method: str, seed: int) -> SearchResult:
        """The result of one search on the proxy, of an earlier call where it is there."""
        name = f"{self._model}-{budget}-{method}-seed{seed}"
        path = self._out / f"{name}.search.json"
        if path.exists():
            return SearchResult.load(path)
        model = self._float_model("proxy")
        kind, options = _parse(method)
        torch.manual_seed(seed)
        searcher = PolicySearcher(
            model,
            budget=Budget(bitops=budget),
            epochs=_SEARCH_EPOCHS,
            method=kind,
            autocast=self._autocast,
            progress=_Printed(name),
            meta={"architecture": self._model, "method": method, "seed": seed},
            **options,
        )
        result = searcher.fit(self._train["proxy"].with_seed(seed))
        write_json(self._out / f"{name}.history.json", {"history": result.history})
        result.save(path)
        return result

    def cell(
        self, result: SearchResult, budget: str, method: str, seed: int, *, data: str = "target", suffix: str = ""
    ) -> dict[str, object]:
        """The policy of a search within a budget, fine-tuned: cost, accuracy and loss, written to ``*.SUFFIX.json``.

        With a suffix of its own it is the policy of a search for another budget; else the suffix is that of the data.

        The policy is solved anew from the probabilities: those of an earlier call may have had another solver.
        """
        limit = Budget(bitops=budget)
        policy = result.policy_for(limit)
        bits = " ".join(f"{layer.weight_bits}/{layer.act_bits}" for layer in policy.values())
        path = self._out / f"{self._model}-{budget}-{method}-seed{seed}.{suffix or SUFFIXES[data]}.json"
        if path.exists() and (cell := _read(path))["policy"] == bits:
            return cell
        history = self._out / f"{self._model}-{budget}-{method}-seed{seed}.history.json"
        last = (_read(history)["history"] or [{}])[-1] if not suffix and history.exists() else {}
        cell = {
            "model": self._model,
            "budget": budget,
            "method": method,
            "seed": seed,
            **self._fine_tuned(policy, bits, seed, path.name.removesuffix(".json"), data),
            "budget_share": result.costs(policy).bitops / limit.limits(result.profiles, result.choices)["bitops"],
            "expected_share": result.expected_cost.get("bitops"),
            "radius": {key: last[key] for key in ("rho", "h", "share_at_rho_min", "share_at_rho_max") if key in last},
            "policy": bits,
        }
        write_json(path, cell)
        return cell

    def _fine_tuned(self, policy: Policy, bits: str, seed: int, name: str, data: str) -> dict[str, float]:
        """Top-1 and loss on the data, of an earlier cell with the same policy and seed where there is one."""
        resolved = self._out.glob("*.resolved.json") if data == "target" else ()
        for cell in (*_cells(self._out, data), *map(_read, sorted(resolved))):
            if (cell["model"], cell["seed"], cell["policy"]) == (self._model, seed, bits):
                return {key: cell[key] for key in ("top1", "loss")}
        model = self._float_model(data)
        torch.manual_seed(seed)
        trainer = TransferTrainer(
            asga.quantize(model, policy).to(memory_format=torch.channels_last),
            epochs=_TRANSFER_EPOCHS,
            method="sgd",
            autocast=self._autocast,
            progress=_Printed(f"{name} on the {data}"),
        )
        evaluation = trainer.fit(self._train[data].with_seed(seed), self._val[data]).evaluation
        return {"top1": evaluation.top1, "loss": evaluation.loss}

    def _float_model(self, name: str) -> nn.Module:
        """Of the proxy or the target, trained once; seed 0."""
        train = self._train[name]
        torch.manual_seed(0)
        options = {} if self._model == "resnet20" else {"small_images": self._options.total_stride == 8}
        model = build_model(self._model, train.dataset.num_classes, train.dataset.image_shape[0], **options)
        model = model.to(memory_format=torch.channels_last)
        path = self._out / f"{self._model}-{name}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model
        trainer = TransferTrainer(
            model,
            epochs=_FLOAT_EPOCHS,
            method="sgd",
            lr=_FLOAT_LR,
            weight_decay=_FLOAT_WEIGHT_DECAY,
            autocast=self._autocast,
            progress=_Printed(f"{self._model} float {name}"),
        )
        trainer.fit(train)
        save_tensors(path, model.state_dict())
        found = evaluate(model, self._val[name], autocast=self._autocast)
        write_json(self._out / f"{self._model}-{name}.json", {"model": self._model, "data": name, **asdict(found)})
        return model


class _Printed:
    """A line for every epoch."""

    def __init__(self, name: str) -> None:
        self._name, self._started = name, time.perf_counter()

    def __call__(self, progress: object) -> None:
        if progress.step == progress.steps:
            numbers = ", ".join(f"{key} {value:.3f}" for key, value in progress.metrics.items())
            seconds = time.perf_counter() - self._started
            print(f"{self._name}: epoch {progress.epoch}/{progress.epochs}, {numbers}, {seconds:.0f} s", flush=True)


def _parse(method: str) -> tuple[str, dict[str, object]]:
    """The method of the searcher, and options for `PolicySearcher`, of ``method:name=value,name=value``."""
    kind, _, rest = method.partition(":")
    options = {}
    # Values may have commas of their own, such as those of a temperature.
    for name, _, value in (pair.partition("=") for pair in re.split(r",(?=[a-z_]+=)", rest) if pair):
        where = options if name in signature(PolicySearcher).parameters else options.setdefault("optimizer_options", {})
        where[name] = json.loads(value)
    return kind, options


def _batches(spec: str, split: str, limit: int | None, like: Batches | None = None) -> Batches:
    dataset = open_dataset(spec, split, limit=limit)
    if like is None:
        return Batches(dataset, _BATCH, shuffle=True, augment=True)
    return Batches(dataset, 500, shuffle=False, augment=False, mean=like.mean, std=like.std)


def _cells(out: Path, data: str) -> Iterator[dict[str, object]]:
    return map(_read, sorted(out.glob(f"*.{SUFFIXES[data]}.json")))


def _read(path: Path) -> dict[str, object]:
    return json.loads(path.read_text(encoding="utf-8"))


def _summarize(out: Path) -> None:
    """``study.json`` and ``study.md``: every cell, and means with the spread over seeds."""
    cells = {data: list(_cells(out, data)) for data in DATA}
    floats = [_read(path) for path in sorted((*out.glob("*-proxy.json"), *out.glob("*-target.json")))]
    write_json(
        out / "study.json",
        {"machine": machine_facts(), "float": floats, "cells": cells["target"], "proxy_cells": cells["proxy"]},
    )
    lines = []
    for data, found in cells.items():
        groups: dict[tuple[str, str], dict[str, dict[int, Mapping[str, object]]]] = {}
        for cell in found:
            by_method = groups.setdefault((cell["model"], cell["budget"]), {})
            by_method.setdefault(cell["method"], {})[cell["seed"]] = cell
        for (model, budget), by_method in groups.items():
            lines += [f"### {model}, BitOps of {budget}, fine-tuned on the {data}", "", _HEAD]
            for method in sorted(by_method, key=lambda m: METHODS.index(m) if m in METHODS else len(METHODS)):
                agreement = _agreement(out, f"{model}-{budget}-{method}", by_method[method])
                lines.append(_row(method, by_method[method], by_method.get("uniform", {}), agreement))
            lines.append("")
    write_atomic(out / "study.md", "\n".join(lines))


_HEAD = (
    "| method | seeds | top-1 | loss | loss minus that of uniform, paired | of the budget "
    "| seeds agree (chance, p) |\n"
    "|---|---|---|---|---|---|---|"
)


def _agreement(out: Path, name: str, seeds: Iterable[int]) -> str:
    """Share of equal choices between the policies of the seeds, what chance would give, and how likely that is."""
    results = {f"seed{seed}": SearchResult.load(out / f"{name}-seed{seed}.search.json") for seed in seeds}
    if len(results) < 2:
        return ""
    choices = searched_choices(next(iter(results.values())).choices)
    found = policy_agreement({seed: result.policy for seed, result in results.items()}, choices)
    return f"{100 * found.equal:.0f} % ({100 * found.chance:.0f} %, {found.p_value:.4f})"


def _row(
    method: str,
    cells: Mapping[int, Mapping[str, object]],
    uniform: Mapping[int, Mapping[str, object]],
    agreement: str,
) -> str:
    paired = [cell["loss"] - uniform[seed]["loss"] for seed, cell in cells.items() if seed in uniform]
    top1 = [100 * cell["top1"] for cell in cells.values()]
    shares = [100 * cell["budget_share"] for cell in cells.values()]
    columns = [
        method,
        str(len(cells)),
        f"{spread(top1, 2)} %",
        spread([cell["loss"] for cell in cells.values()], 4),
        spread(paired, 4) if paired and method != "uniform" else "",
        f"{spread(shares, 1)} %",
        agreement,
    ]
    return f"| {' | '.join(columns)} |"


if __name__ == "__main__":
    main()
