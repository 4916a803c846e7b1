import json
import shutil

import pytest


@pytest.fixture
def two(figures, tmp_path):
    """Two folders of runs that have hardly begun: nothing to draw."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        config = {"command": "search", "options": {"data": "digits", "seed": len(name)}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))


def test_of_one_run_is_its_page(run, two, tmp_path):
    assert run("report", "first") == (0, "first/report.html\n", "")
    assert "<h1>asga search</h1>" in (tmp_path / "first" / "report.html").read_text()


def test_of_one_run_can_be_elsewhere(run, two, tmp_path):
    assert run("report", "first", "--out", "page.html") == (0, "page.html\n", "")
    assert not (tmp_path / "first" / "report.html").exists()
    assert (tmp_path / "page.html").exists()


def test_of_several_runs_is_a_comparison(run, two, tmp_path):
    assert run("report", "first", "second") == (0, "comparison.html\n", "")
    assert "<h1>2 runs</h1>" in (tmp_path / "comparison.html").read_text()
    assert run("report", "second", "first", "--out", "other.html") == (0, "other.html\n", "")


def test_of_a_search_and_a_transfer(figures, run, search_arguments, transfer_arguments, tmp_path):
    """As the commands leave them."""
    assert run(*search_arguments, "--out", "search", "--seeds", 2)[0] == 0
    assert run(*transfer_arguments, "--policy", "search/policy.json", "--out", "transfer")[0] == 0
    assert run("report", "search", "transfer") == (0, "comparison.html\n", "")
    page = (tmp_path / "comparison.html").read_text()
    assert "the same bits in <b>100.0 %</b> of the 4 choices" in page
    assert "float: search, transfer." in page
    assert run("report", "search")[0] == 0
    page = (tmp_path / "search" / "report.html").read_text()
    for heading in ("Sensitivity of layers", "Beside uniform bits", "Agreement of seeds"):
        assert f"<h2>{heading}</h2>" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere holds no run"),
        (("first", "nowhere"), "nowhere holds no run"),
        (("first", "first"), "first is there twice"),
        (("first", "--out", "no/where.html"), "no/where.html cannot be written: there is no folder no"),
    ],
    ids=" ".join,
)
def test_bad_input(fails, two, tmp_path, arguments, message):
    assert message in fails("report", *arguments)
    assert not list(tmp_path.rglob("*.html"))


def test_damaged_run(fails, two, tmp_path):
    shutil.copy(tmp_path / "first" / "config.json", tmp_path / "second" / "result.json")
    (tmp_path / "second" / "policy.json").write_text("{")
    assert "second/policy.json: not valid JSON" in fails("report", "first", "second")
