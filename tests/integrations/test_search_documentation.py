"""docs/search.md: its blocks are run, one after the other, as the page says."""

import re
import warnings
from pathlib import Path

import torch

from asga.search import METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "search.md").read_text(encoding="utf-8")


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "documentation"}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model of the page is not trained: no policy is better than another
        for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
            exec(compile(block, "docs/search.md", "exec"), namespace)
    result = namespace["result"]
    assert all(share <= 1 for share in result.cost_shares(result.policy).values())
    assert namespace["losses"].keys() == result.choices.layers.keys()
    printed = capsys.readouterr().out
    assert "bitops" in printed  # the least that can be met
    assert "onnxruntime-cpu" in printed  # what the target has


def test_the_table_has_every_method():
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `.*? \|", PAGE[PAGE.index("## Methods") :], re.M))))
    assert named == set(METHODS)
