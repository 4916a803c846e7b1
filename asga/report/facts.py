"""What there is to say about a run in words: what it was about, how far it came, what should be known of it."""

from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

from asga.policy import Policy, bit_width
from asga.report.html import bytes_, count, duration, percent
from asga.report.run import METRIC_NAMES, Run
from asga.search.comparison import UniformComparison
from asga.search.methods import METHODS, TRAINED

# A radius on one bound for more than this share of the steps is in effect a constant.
_STUCK_SHARE = 0.9
# By the way in which policies were scored.
_NOTES = {
    "fine-tuned": "All were fine-tuned for a few steps from the float model.",
    "float weights": (
        "All have the float weights, quantized without training. That leans towards few activation bits: training "
        "repairs weights, not activations."
    ),
    "mixture": (
        "All are choices of the same mixture, its weights as the search left them, batch normalization measured anew. "
        "That leans towards the policy: one that is not better here is hardly worth its search, one that is better has "
        "still to prove it after a transfer."
    ),
}


def run_facts(run: Run) -> dict[str, str]:
    """What a run was about and how far it came, by name."""
    meta = run.policy.meta if run.policy is not None else {}
    options = run.options
    epoch = run.last_epoch
    facts = {
        "model": options.get("model") or meta.get("architecture"),
        "data": options.get("data"),
        "policy searched on": meta.get("proxy"),
        "budget": _budget(meta.get("budget", {})) or options.get("budget"),
    }
    for metric, limit in meta.get("limits", {}).items():
        if metric in meta.get("costs", {}):
            # The target may have another resolution and head: what it costs there stands in the table of results.
            where = " in the search" if run.command in ("transfer", "diagnose") else ""
            name = f"{METRIC_NAMES.get(metric, metric)} of the policy{where}"
            facts[name] = _cost_against(metric, meta["costs"][metric], limit)
    if run.result is not None:
        facts["time"] = duration(run.result["seconds"]) if "seconds" in run.result else None
    elif epoch is None:
        facts["state"] = "not finished; no epoch is complete yet"
    else:
        epochs = [e for seeds in run.stages.values() for epochs in seeds.values() for e in epochs]
        facts["state"] = f"not finished; last epoch: {epoch['stage']}, {epoch['epoch']} of {epoch['epochs']}"
        facts["time so far"] = duration(sum(e["seconds"] for e in epochs))
    facts["started"] = run.config.get("created")
    return {name: str(value) for name, value in facts.items() if value}


def run_warnings(run: Run) -> list[str]:
    """What makes results less than they seem, a sentence each."""
    recoveries = Counter(event.get("stage") for event in run.events if event["event"] == "recovery")
    warnings = [
        f"{stage}: training went back to an earlier step {times} time{'s' * (times > 1)}, see Events below."
        for stage, times in recoveries.items()
    ]
    if (run.result or {}).get("method") != "uniform":
        warnings += _not_better(uniform_comparisons(run))
    for stage, seeds in run.stages.items():
        for bound, where in (("rho_min", "lower"), ("rho_max", "upper")):
            shares = [epochs[-1].get(f"share_at_{bound}", 0.0) for epochs in seeds.values()]
            if stuck := [share for share in shares if share > _STUCK_SHARE]:
                warnings.append(
                    f"{stage}: the radius ρ was on its {where} bound, {bound}, in {' and '.join(map(percent, stuck))} "
                    f"of the steps. It did not adapt but was in effect a constant."
                )
    if run.unreadable:
        warnings.append(
            f"Lines of metrics.jsonl that could not be read and are missing here: {run.unreadable}. A process that is "
            f"killed leaves its last line cut short."
        )
    return warnings


def run_events(run: Run) -> list[str]:
    """What was out of the ordinary, in order; of the steps that were left out, the first of each stage."""
    skipped = Counter(event.get("stage") for event in run.events if event["event"] == "skipped")
    lines, seen = [], set()
    for event in run.events:
        where = [str(event["stage"])] if "stage" in event else []
        where += [f"{name} {event[name]}" for name in ("epoch", "step") if name in event]
        text = f"{', '.join(where)}: {event.get('what') or event.get('reason') or event['event']}"
        stage = event.get("stage")
        if event["event"] != "skipped":
            lines.append(text)
        elif stage not in seen:
            seen.add(stage)
            lines.append(f"{text}. Steps of {stage} that were left out: {skipped[stage]}")
    return lines


def uniform_comparisons(run: Run) -> dict[str, UniformComparison]:
    """By search, its comparison with the uniform pairs of bits, where there are any."""
    result = run.result or {}
    found = {name: seed.get("uniform") for name, seed in result.get("seeds", {}).items()}
    found |= {"policy": result.get("uniform")}
    return {name: UniformComparison.from_dict(one) for name, one in found.items() if one and one["pairs"]}


def uniform_notes(run: Run) -> list[str]:
    """How the policies of those comparisons were scored, and what that is worth; see `asga.search.scoring.Scorer`."""
    compared, notes = uniform_comparisons(run), {}
    for name, found in compared.items():
        notes.setdefault(_NOTES[scored(run, tuned=found.tuned)], []).append(name)
    return [note if len(notes) == 1 else f"{', '.join(names)}: {note}" for note, names in notes.items()]


class MeanBits(NamedTuple):
    """Mean bits over those of all layers of a policy that are quantized."""

    bits: float
    layers: int
    of: int


def scored(run: Run, *, tuned: bool) -> str:
    """The way in which policies were compared with uniform ones, in a word; losses of different ways do not compare."""
    if tuned:
        return "fine-tuned"
    method = (run.result or {}).get("method")
    return "float weights" if method in METHODS and method not in TRAINED else "mixture"


def mean_bits(policy: Policy | None) -> dict[str, MeanBits]:
    """Of weights and of activations."""
    layers = [] if policy is None else policy.values()
    bits = {
        "weights": [bit_width(layer.weight_bits) for layer in layers if layer.weight_bits is not None],
        "activations": [layer.act_bits for layer in layers if layer.act_bits is not None],
    }
    return {kind: MeanBits(fmean(values), len(values), len(layers)) for kind, values in bits.items() if values}


def _not_better(compared: Mapping[str, UniformComparison]) -> list[str]:
    """Of the policy, and of those of single seeds, what is not better than uniform bits."""
    seeds = {name: found for name, found in compared.items() if name != "policy"}
    policy = compared.get("policy")
    lines = [f"the policy is {policy.verdict}"] if policy is not None and policy.better is not True else []
    verdicts = Counter(found.verdict for found in seeds.values() if found.better is not True)
    lines += [f"policies of single seeds: {n} of {len(seeds)} {verdict}" for verdict, n in verdicts.items()]
    return [f"On the proxy, at equal cost, {line}, see below." for line in lines]


def _budget(budget: Mapping[str, object]) -> str:
    return ", ".join(f"{METRIC_NAMES.get(name, name)} ≤ {amount}" for name, amount in budget.items())


def _cost_against(metric: str, cost: int, limit: int) -> str:
    show = {
        "size_bits": lambda bits: bytes_(bits / 8),
        "act_memory_bits": lambda bits: bytes_(bits / 8),
        "latency_ns": lambda time: f"{count(time / 1e9)}s",
    }.get(metric, count)
    verdict = "within the budget" if cost <= limit else "over the budget"
    return f"{show(cost)} of {show(limit)} ({percent(cost / limit)}), {verdict}"
