"""Reading a run folder, complete or not."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from asga._files import read_json
from asga.policy import Policy

# What is logged of an epoch; see `asga.training.Stage` and the trainers for the keys.
Epoch = dict[str, object]
# The epochs of each run of a stage, by seed.
Seeds = dict[str, list[Epoch]]
# Candidates and their probabilities by layer: ``weight_bits``, ``weight_probs``, ``act_bits``, ``act_probs``.
Layers = dict[str, dict[str, list]]

# The tensors of a layer, as policies name them and as people do.
TENSORS = {"weight": "weight", "act": "activation"}
# What records must have to be shown; others need only say what they are.
_KEYS = {"epoch": {"stage", "epoch", "epochs", "seconds"}, "probabilities": {"stage", "epoch", "layers"}}
METRIC_NAMES = {
    "bitops": "BitOps",
    "size_bits": "size",
    "act_memory_bits": "activation memory",
    "act_memory": "activation memory",
    "latency_ns": "latency",
}


@dataclass(frozen=True)
class Run:
    """What the files of a run folder hold; empty or None where a file is not there.

    Args:
        config: ``config.json``.
        policy: ``policy.json``.
        result: ``result.json``; a run that is under way has none.
        stages: The epochs of ``metrics.jsonl`` by stage and seed: ``"search/seed0"`` is stage ``"search"``,
            seed ``"seed0"``; the seed is ``""`` where the stage names none.
        last_epoch: The epoch that was logged last.
        probabilities: By seed and epoch the probabilities of the stage that logged some last.
        events: What else was logged, such as a recovery, in order.
        unreadable: Lines of ``metrics.jsonl`` that are no records: a killed process leaves its last one cut short.
    """

    config: dict[str, object]
    policy: Policy | None
    result: dict[str, object] | None
    stages: dict[str, Seeds]
    last_epoch: Epoch | None
    probabilities: dict[str, dict[int, Layers]]
    events: list[dict[str, object]]
    unreadable: int

    @property
    def command(self) -> str:
        """What ran: "search", "transfer", ...; "run" where no file tells."""
        return self.config.get("command") or (self.result or {}).get("command") or "run"

    @property
    def options(self) -> dict[str, object]:
        """The options of the command."""
        return self.config.get("options", {})


def read_run(folder: str | os.PathLike) -> Run:
    """Read what is there of a run.

    Raises:
        FileNotFoundError: The folder has none of the files of a run.
        ValueError: A file is damaged; the message names it.
    """
    folder = Path(folder)
    names = ("config.json", "metrics.jsonl", "policy.json", "result.json")
    present = {name for name in names if (folder / name).is_file()}
    if not present:
        raise FileNotFoundError(f"{folder} holds no run: none of {', '.join(names)} is there")
    records, unreadable = _read_lines(folder / "metrics.jsonl") if "metrics.jsonl" in present else ([], 0)
    stages: dict[str, Seeds] = {}
    found: dict[str, dict[str, dict[int, Layers]]] = {}
    events: list[dict[str, object]] = []
    last_epoch = None
    for record in records:
        if record["event"] == "epoch":
            stage, seed = _stage_and_seed(record["stage"])
            stages.setdefault(stage, {}).setdefault(seed, []).append(record)
            last_epoch = record
        elif record["event"] == "probabilities":
            stage, seed = _stage_and_seed(record["stage"])
            found.setdefault(stage, {}).setdefault(seed, {})[record["epoch"]] = record["layers"]
        else:
            events.append(record)
    return Run(
        config=read_json(folder / "config.json") if "config.json" in present else {},
        policy=Policy.load(folder / "policy.json") if "policy.json" in present else None,
        result=read_json(folder / "result.json") if "result.json" in present else None,
        stages=stages,
        last_epoch=last_epoch,
        probabilities=list(found.values())[-1] if found else {},
        events=events,
        unreadable=unreadable,
    )


def _read_lines(path: Path) -> tuple[list[dict[str, object]], int]:
    """The records of ``metrics.jsonl``, and how many lines could not be read as such."""
    records, unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and _KEYS.get(record.get("event"), {"event"}) <= record.keys():
            records.append(record)
        else:
            unreadable += 1
    return records, unreadable


def _stage_and_seed(name: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.+)/(seed\d+)", name)
    return (match[1], match[2]) if match else (name, "")
