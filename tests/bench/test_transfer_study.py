"""The study of search methods, on a few digits."""

import functools
import json

import pytest

from asga.bench import transfer_study
from asga.search import scoring


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs a study of one epoch each and returns its cells."""
    for name in ("_FLOAT_EPOCHS", "_SEARCH_EPOCHS", "_TRANSFER_EPOCHS"):
        monkeypatch.setattr(transfer_study, name, 1)
    monkeypatch.setattr(transfer_study, "_BATCH", 20)
    monkeypatch.setattr(scoring, "_TUNING_STEPS", 1)

    def run(*arguments: str) -> list[dict[str, object]]:
        data = ["--proxy", "digits", "--target", "digits", "--limit", "40", "--precision", "float32"]
        folder = ["--out", str(tmp_path), "--models", "resnet20", "--budgets", "w3a3"]
        transfer_study.main([*data, *folder, *arguments])
        return json.loads((tmp_path / "study.json").read_text())["cells"]

    return run


@pytest.mark.filterwarnings("ignore:the policy is not better than uniform bits")
def test_cells_are_paired_and_run_once(study, tmp_path, capsys):
    cells = study("--methods", "uniform", "sgd", "--seeds", "0", "1")
    assert [(cell["method"], cell["seed"]) for cell in cells] == [
        ("sgd", 0),
        ("sgd", 1),
        ("uniform", 0),
        ("uniform", 1),
    ]
    assert all(cell["budget_share"] <= 1 and 0 <= cell["top1"] <= 1 for cell in cells)
    rows = (tmp_path / "study.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows if row.startswith("| ")] == ["method", "sgd", "uniform"]
    capsys.readouterr()
    assert study("--methods", "uniform", "sgd", "--seeds", "0") == cells
    assert capsys.readouterr().out == ""  # nothing was trained again


@pytest.mark.filterwarnings("ignore:the policy is not better than uniform bits")
def test_equal_policies_of_a_seed_share_their_fine_tuning(study, capsys):
    cells = study("--methods", "uniform", "--seeds", "0", "--budgets", "w3a3", "1.001*w3a3")
    assert cells[0]["policy"] == cells[1]["policy"]
    assert cells[0]["loss"] == cells[1]["loss"]
    assert capsys.readouterr().out.count("on the target") == 1


@pytest.mark.filterwarnings("ignore:the policy is not better than uniform bits")
def test_policies_are_fine_tuned_on_either_dataset(study, tmp_path, capsys):
    of_target = study("--methods", "random", "--seeds", "0")
    capsys.readouterr()
    assert study("--methods", "random", "--seeds", "0", "--fine-tune-on", "target", "proxy") == of_target
    out = capsys.readouterr().out
    assert (out.count("on the proxy"), out.count("on the target")) == (1, 0)
    (of_proxy,) = json.loads((tmp_path / "study.json").read_text())["proxy_cells"]
    assert of_proxy["policy"] == of_target[0]["policy"]
    assert of_proxy["budget_share"] == of_target[0]["budget_share"]
    assert "resnet20, BitOps of w3a3, fine-tuned on the proxy" in (tmp_path / "study.md").read_text()


@pytest.mark.filterwarnings("ignore:the policy is not better than uniform bits")
def test_a_method_may_carry_options(study, monkeypatch, tmp_path):
    made = []
    searcher = transfer_study.PolicySearcher

    class Noted(searcher):
        @functools.wraps(searcher.__init__)  # its arguments are asked for
        def __init__(self, model, **options):
            super().__init__(model, **options)
            made.append(self)

    monkeypatch.setattr(transfer_study, "PolicySearcher", Noted)
    cells = study("--methods", 'asga:held_out=0.5,rho_max=0.1,perturb="latent"', "--seeds", "0")
    assert [cell["method"] for cell in cells] == ['asga:held_out=0.5,rho_max=0.1,perturb="latent"']
    assert (made[0].method, made[0].held_out) == ("asga", 0.5)
    assert made[0].optimizer_options == {"rho_max": 0.1, "perturb": "latent"}
    assert "| asga:held_out=0.5" in (tmp_path / "study.md").read_text()


def test_the_total_stride_is_that_of_small_images_unless_asked(study, monkeypatch):
    asked = []
    build = transfer_study.build_model

    def noted(name, *arguments, **options):
        asked.append(options)
        return build("resnet20", *arguments)

    monkeypatch.setattr(transfer_study, "build_model", noted)
    study("--models", "mobilenet_v2", "--methods", "uniform", "--seeds", "0")
    assert {options["small_images"] for options in asked} == {True}
    asked.clear()
    study("--models", "resnet18", "--methods", "uniform", "--seeds", "0", "--total-stride", "32")
    assert {options["small_images"] for options in asked} == {False}
