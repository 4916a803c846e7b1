"""A search that is killed by SIGKILL again and again ends as one that never was, bit for bit."""

import json

KILLS = 20

# Children are forked, so that torch is imported once, by a process that has no threads.
CODE = """
import os, random, signal, sys, time, traceback
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)
import scipy.optimize, torch._dynamo  # which take every child seconds otherwise, optimizers import the latter
import asga, asga.recovery
from asga.runs import RunFolder

asga.recovery.MOST_SKIPPED = 2  # so that a short search goes back, too
generator = torch.Generator().manual_seed(0)
labels = torch.randint(3, (48,), generator=generator)
images = torch.randn(48, 1, 8, 8, generator=generator)
images[torch.arange(48), 0, :, labels] += 3
images[:3] = float("nan")


def net():
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    second = [nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    third = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*first, *second, *third, nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 3))


def search(path):
    folder = RunFolder(path, "search", {}, resume=(path / "config.json").exists())
    torch.manual_seed(1)
    random.seed(1)  # Python draws a new one in every child
    loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)
    options = {"epochs": 6, "checkpoint_every": 2, "measure_batches": 1}
    searcher = asga.PolicySearcher(net(), budget=asga.Budget(bitops="w3a3"), folder=folder, **options)
    result = searcher.fit(loader)
    result.save(path / "search.json")
    result.policy.save(path / "policy.json")


def die_at(call, number, after):
    original, calls = getattr(os, call), []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        done = original(*arguments)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(os, call, counted)


def start(path, *fault):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if fault:
                die_at(*fault)
            search(path)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def finish(child):
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WIFSIGNALED(status), status
    return os.WIFSIGNALED(status)


root = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT)
began = time.perf_counter()
assert not finish(start(root / "whole"))
duration = time.perf_counter() - began

# At the exact instants of the second checkpoint's way to the disk: before and after a flush; before the old one is
# moved, between that and the new one's move, and after both.
faults = [("fsync", 3, False), ("fsync", 4, True), ("replace", 3, False), ("replace", 3, True), ("replace", 4, True)]
for fault in faults:
    assert finish(start(root / "faults", *fault)), fault
assert not finish(start(root / "faults"))

# At random moments; a search that is through is followed by another.
moments, kills, number = random.Random(0), 0, 0
while kills < KILLS:
    child = start(root / f"killed{number}")
    time.sleep(moments.uniform(0, duration / 2))
    os.kill(child, signal.SIGKILL)  # which one that has ended in the meantime no longer minds
    if finish(child):
        kills += 1
    else:
        number += 1
assert not finish(start(root / f"killed{number}"))
print(f"{duration:.2f} s a search, {kills} kills in {number + 1}", flush=True)
"""


def without_times(path) -> list[dict]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_ends_as_if_never_killed(run_python, run_contents, tmp_path):
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    run_python(f"ROOT, KILLS = {str(tmp_path)!r}, {KILLS}\n{CODE}", **threads)
    whole = tmp_path / "whole"
    events = {line["event"] for line in without_times(whole)}
    assert events == {"epoch", "probabilities", "skipped", "recovery"}
    others = [path for path in tmp_path.iterdir() if path != whole]
    assert len(others) >= 2
    for path in others:
        for name in ("policy.json", "search.json"):
            assert (path / name).read_bytes() == (whole / name).read_bytes()
        assert run_contents(path) == run_contents(whole)
        assert not list(path.glob(".checkpoint*"))  # that were being written
