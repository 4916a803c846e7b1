import re
import sys

import pytest

import asga
from asga.cli import main


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"asga {asga.__version__}\n"


@pytest.mark.parametrize("command", ["search", "transfer", "evaluate", "diagnose", "report", "demo", "info"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: asga {command}" in shown
    assert not re.search(r"\(default:\s*(None|False|\[\]|)\)", shown)
    assert command in ("evaluate", "report", "info") or "(default: " in shown


@pytest.mark.parametrize("arguments", [[], ["report"], ["search"], ["search", "--method", "hawq"]], ids=" ".join)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: asga" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["rich.console", "rich.progress"])
def test_without_rich(fails, search_arguments, monkeypatch, module, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    err = fails(*search_arguments)
    assert 'pip install "asga[search]"' in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_ctrl_c_before_a_run_has_begun(run, search_arguments, monkeypatch):
    """There is nothing to resume then, and the hint would lead nowhere."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("asga.cli.options.open_dataset", interrupt)
    status, _, err = run(*search_arguments)
    assert (status, err) == (130, "\nasga: stopped.\n")


def test_bugs_are_not_hidden(run, search_arguments, monkeypatch):
    def broken(*_, **__):
        raise KeyError("a mistake in asga")

    monkeypatch.setattr("asga.cli.options.open_dataset", broken)
    with pytest.raises(KeyError):
        run(*search_arguments)


def test_as_a_module(run_python):
    code = "import runpy, sys; sys.argv = ['asga', '--version']; runpy.run_module('asga', run_name='__main__')"
    assert run_python(code) == f"asga {asga.__version__}"
