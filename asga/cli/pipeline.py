"""The steps that commands are made of: a float model, a search, a transfer. Each is passed over when resuming."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from asga._files import save_tensors, write_json
from asga.cli.console import Console
from asga.cli.options import load_weights
from asga.convert import quantize
from asga.data import Batches
from asga.policy import Policy
from asga.runs import RunFolder
from asga.search import PolicySearcher, SearchResult
from asga.search.comparison import NotBetterThanUniform, UniformComparison
from asga.search.costs import Costs
from asga.training import CHECKPOINT_EVERY
from asga.transfer import TransferTrainer

# A float model is trained from scratch: a learning rate and a weight decay usual for small ResNets (He et al. 2016,
# section 4.2: 0.1 and 1e-4; 5e-4 has become customary on CIFAR).
_FLOAT_LR, _FLOAT_WEIGHT_DECAY = 0.1, 5e-4


@dataclass(frozen=True)
class Setting:
    """What all steps of a command have in common."""

    folder: RunFolder
    console: Console
    train: Batches
    val: Batches
    autocast: torch.dtype | None
    checkpoint_every: int = CHECKPOINT_EVERY


def float_model(
    setting: Setting, build: Callable[[int], nn.Module], *, epochs: int, seed: int, stage: str = "float"
) -> tuple[nn.Module, dict[str, object]]:
    """A trained float model, and its record (top1, loss, seconds) on the validation batches."""
    model = build(seed)
    record = _finished(setting, stage, model)
    if record is None:
        trainer = TransferTrainer(
            model,
            epochs=epochs,
            method="sgd",
            lr=_FLOAT_LR,
            weight_decay=_FLOAT_WEIGHT_DECAY,
            validate_every=max(1, epochs // 5),
            autocast=setting.autocast,
            checkpoint_every=setting.checkpoint_every,
            folder=setting.folder,
            progress=setting.console.progress,
            stage=stage,
        )
        record = _fit(setting, trainer)
    setting.console.note(f"{stage}: top-1 {record['top1']:.1%}")
    return model, record


def transferred(
    setting: Setting,
    model: nn.Module,
    policy: Policy,
    *,
    epochs: int,
    method: str,
    stage: str,
    seed: int,
) -> tuple[nn.Module, dict[str, object]]:
    """A float model quantized by a policy and fine-tuned, and its record on the validation batches."""
    torch.manual_seed(seed)
    # The same images in another order: what differs between two seeds besides the float model.
    train = setting.train.with_seed(seed)
    quantized = quantize(model, policy)
    record = _finished(setting, stage, quantized)
    if record is None:
        trainer = TransferTrainer(
            quantized,
            epochs=epochs,
            method=method,
            autocast=setting.autocast,
            checkpoint_every=setting.checkpoint_every,
            folder=setting.folder,
            progress=setting.console.progress,
            stage=stage,
        )
        record = _fit(setting, trainer, train)
    setting.console.note(f"{stage}: top-1 {record['top1']:.1%}")
    return quantized, record


def searched(
    setting: Setting, searcher: Callable[[], PolicySearcher], *, stage: str, seed: int, path: Path
) -> tuple[SearchResult, float]:
    """A search and its seconds; its result is written to `path`. `searcher` is called only if it has to run."""
    if (done := setting.folder.finished(stage)) is not None:
        return SearchResult.load(path), done["seconds"]
    prepared = searcher()
    # The same random numbers whether the float model was just trained, read from a file or finished earlier.
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotBetterThanUniform)  # commands say it themselves
        result = prepared.fit(setting.train.with_seed(seed))
    seconds = training_seconds(result.history)
    result.save(path)
    setting.folder.finish(stage, {"seconds": seconds})
    return result, seconds


def compared(
    setting: Setting, searcher: Callable[[], PolicySearcher], policy: Policy, *, seed: int
) -> UniformComparison:
    """A policy of several searches beside uniform ones. `searcher` is called only if it has to run."""
    stage = "comparison"
    if (done := setting.folder.finished(stage)) is not None:
        return UniformComparison.from_dict(done["uniform"])
    prepared, started = searcher(), time.perf_counter()
    torch.manual_seed(seed)
    found = prepared.compare(policy, setting.train.with_seed(seed))
    record = {"uniform": found.to_dict(), "seconds": round(time.perf_counter() - started, 3)}
    setting.folder.finish(stage, record)
    return found


def training_seconds(history: Iterable[Mapping[str, object]]) -> float:
    """The time that all epochs took, those before an interruption included."""
    return sum(record["seconds"] for record in history)


def table_row(
    name: str,
    records: list[dict[str, object]],
    *,
    bits: str,
    costs: Costs | None = None,
    bitops_share: float | None = None,
) -> dict[str, object]:
    """A row of ``result.json``: top-1 and loss over seeds, and what the policy costs."""
    top1, losses = ([record[key] for record in records] for key in ("top1", "loss"))
    return {
        "name": name,
        "weight_bits": bits,
        "bitops": None if costs is None else costs.bitops,
        "size_bytes": None if costs is None else costs.size_bytes,
        "bitops_share": bitops_share,
        "top1": top1,
        "top1_mean": statistics.fmean(top1),
        "top1_std": statistics.stdev(top1) if len(top1) > 1 else None,
        "loss": losses,
        "loss_mean": statistics.fmean(losses),
        "loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
        "seeds": len(records),
        "seconds": statistics.fmean(record["seconds"] for record in records),
    }


def show_table(console: Console, title: str, table: list[dict[str, object]]) -> None:
    """Print rows of `table_row`."""
    rows = []
    for row in table:
        spread = "" if row["top1_std"] is None else f" ± {row['top1_std']:.1%}"
        rows.append(
            {
                "model": row["name"],
                "top-1": f"{row['top1_mean']:.1%}{spread}",
                "loss": f"{row['loss_mean']:.3f}",
                "BitOps": "" if row["bitops"] is None else f"{row['bitops'] / 1e6:,.1f} M",
                "budget": "" if row["bitops_share"] is None else f"{row['bitops_share']:.1%}",
                "weights": "" if row["size_bytes"] is None else f"{row['size_bytes'] / 1e3:,.1f} kB",
                "time": f"{row['seconds']:.0f} s",
            }
        )
    console.table(title, rows)


def finish_run(folder: RunFolder, result: dict[str, object], policy: Policy, console: Console) -> None:
    """Write ``result.json``, ``policy.json``, ``report.html`` and figures as PNG files, and say where they are."""
    write_json(folder.path / "result.json", result)
    policy.save(folder.path / "policy.json")
    written = "policy.json, result.json"
    try:
        from asga.report import save_policy_figure, save_sensitivity_figure, write_report

        save_policy_figure(policy, folder.path / "policy.png")
        written += ", policy.png"
        if "sensitivities" in result:
            save_sensitivity_figure(result["sensitivities"], folder.path / "sensitivity.png", policy)
            written += ", sensitivity.png"
        write_report(folder.path)
        written += ", report.html"
    except ImportError as error:
        console.note(f"no figures: {error}")
    console.note(f"{folder.path}: {written}")


def _fit(setting: Setting, trainer: TransferTrainer, train: Batches | None = None) -> dict[str, object]:
    result = trainer.fit(train if train is not None else setting.train, setting.val)
    record = {**asdict(result.evaluation), "seconds": training_seconds(result.history)}
    save_tensors(_weights(setting, trainer.stage), trainer.model.state_dict())
    setting.folder.finish(trainer.stage, record)
    return record


def _finished(setting: Setting, stage: str, model: nn.Module) -> dict[str, object] | None:
    """The record of a stage that an earlier run of this folder completed; its weights are loaded."""
    record = setting.folder.finished(stage)
    if record is not None:
        load_weights(model, _weights(setting, stage))
    return record


def _weights(setting: Setting, stage: str) -> Path:
    return setting.folder.path / f"{stage.replace('/', '-')}.pt"
