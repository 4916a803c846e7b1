import html.parser
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from asga.policy import LayerPolicy, Policy

BITS = [2, 4, 8]
VOID = {"meta", "link", "br", "img"}


class Page(html.parser.HTMLParser):
    """Fails on a tag that closes another one; gathers headings, ids and the text outside of style sheets."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += " " + data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="session")
def parse() -> Callable[[Path], Page]:
    """A function that reads an HTML file."""

    def read(path: Path) -> Page:
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        assert page.open == []
        page.text = " ".join(page.text.split())
        return page

    return read


@pytest.fixture(scope="session")
def policy() -> Policy:
    """Three layers: one pinned, one searched, one with a float weight."""
    layers = {"conv1": LayerPolicy(8, 8), "layer1.0.conv1": LayerPolicy(2, 4), "fc": LayerPolicy(None, 8)}
    meta = {
        "architecture": "resnet20",
        "proxy": "digits",
        "budget": {"bitops": "w4a4", "size": "1.5MB"},
        "limits": {"bitops": 2_000_000, "size_bits": 12_000_000},
        "costs": {"bitops": 1_500_000, "size_bits": 8_000_000},
    }
    return Policy(layers, meta)


@pytest.fixture(scope="session")
def records() -> list[dict[str, object]]:
    """Two epochs of a float model, two of a search, one of a transfer with each of two seeds."""
    common = {"epochs": 2, "accuracy": 0.5, "lr": 0.01, "seconds": 30.0}
    step = {"h": 0.2, "rho": 0.1, "cosine": 0.9, "kappa": 2.0, "sigma": 40.0, "norm_g0": 1.4, "share_at_rho_min": 0.0}
    found = {
        "layer1.0.conv1": {
            "weight_bits": BITS,
            "weight_probs": [0.45, 0.44, 0.11],
            "act_bits": BITS,
            "act_probs": [0.1, 0.8, 0.1],
        }
    }
    records: list[dict[str, object]] = []
    for epoch in (1, 2):
        records.append({"event": "epoch", "stage": "float", "epoch": epoch, "loss": 2.0 / epoch, **common})
    for epoch in (1, 2):
        cost = {"multiplier": {"bitops": 0.1 * epoch}, "expected_cost": {"bitops": 1.2 / epoch}}
        search = {"event": "epoch", "stage": "search", "epoch": epoch, "loss": 1.0, **common, **step, **cost}
        records.append({"event": "probabilities", "stage": "search", "epoch": epoch, "layers": found})
        records.append({**search, "share_at_rho_max": 0.5})
    for seed, share in ((0, 0.97), (1, 0.5)):
        transfer = {"event": "epoch", "stage": f"searched/seed{seed}", "epoch": 1, "loss": 0.5, **common, **step}
        records.append({**transfer, "val_loss": 0.6, "val_top1": 0.8, "share_at_rho_max": share})
    return records


@pytest.fixture(scope="session")
def result() -> dict[str, object]:
    row = {
        "name": "searched",
        "weight_bits": "mixed",
        "bitops": 1_500_000,
        "size_bytes": 1_000_000,
        "bitops_share": 0.75,
        "top1": [0.93, 0.95],
        "top1_mean": 0.94,
        "top1_std": 0.014,
        "loss_mean": 0.25,
        "loss_std": 0.03,
        "seeds": 2,
        "seconds": 61.0,
    }
    unquantized = {
        "name": "float",
        "bitops": None,
        "size_bytes": None,
        "bitops_share": None,
        "top1_std": None,
        "loss_std": None,
    }
    return {
        "command": "demo",
        "seconds": 3725.0,
        "table": [{**row, **unquantized}, row],
        "notes": ["Each seed searches its own policy."],
        "cost_shares": {"expected": {"bitops": 1.02}, "most_likely": {"bitops": 1.07}, "policy": {"bitops": 0.75}},
    }


@pytest.fixture(scope="session")
def fill_run(policy: Policy, records: list[dict[str, object]], result: dict[str, object]) -> Callable[[Path], None]:
    """Writes all files of a run into a folder."""

    def fill(folder: Path) -> None:
        config = {
            "command": "demo",
            "asga_version": "0.1.0",
            "torch_version": "2.13.0",
            "created": "2026-02-03T10:11:12+00:00",
            "options": {"data": "digits", "seeds": 2},
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "result.json").write_text(json.dumps(result))
        policy.save(folder / "policy.json")

    return fill


@pytest.fixture
def run_folder(tmp_path: Path, fill_run: Callable[[Path], None]) -> Path:
    """A run folder with all its files, to be changed by the test."""
    fill_run(tmp_path)
    return tmp_path
