from asga.cli.console import Console
from asga.training import Progress


def test_what_is_out_of_the_ordinary_gets_a_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # not wrapped
    note = "the loss is nan for 10 steps in a row: back to epoch 2, step 100, half the learning rate"
    with Console() as console:
        console.progress(Progress("search", 2, 5, 30, 50, {"loss": 1.0}))
        console.progress(Progress("search", 2, 5, 31, 50, {"loss": 1.0}, note))
    assert capsys.readouterr().out == f"search: epoch 2/5, {note}\n"
