"""What the terminal shows: progress bars where someone watches, a line per epoch where output goes to a file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from asga._extras import require
from asga.training import Progress


class Console:
    """Output of a command; use it in a ``with`` block.

    Raises:
        ImportError: rich is not installed.
    """

    def __init__(self) -> None:
        self._console = require("rich.console", "search").Console(highlight=False, soft_wrap=True)
        progress = require("rich.progress", "search")
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[text]}"),
            progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task: object | None = None
        self._shown: str | None = None

    def __enter__(self) -> "Console":
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, markup=False)

    def progress(self, state: Progress) -> None:
        """Show where a stage of training is; give it to trainers as `progress`."""
        text = ", ".join(
            f"{name} {value:.1%}" if name == "accuracy" else f"{name} {value:.3f}"
            for name, value in state.metrics.items()
        )
        if state.note is not None:
            self.note(f"{state.stage}: epoch {state.epoch}/{state.epochs}, {state.note}")
        if state.step == state.steps:
            self.note(f"{state.stage}: epoch {state.epoch}/{state.epochs}, {text}")
        if self._console.is_terminal:
            done = (state.epoch - 1) * state.steps + state.step
            self._bar(state.stage, done, state.epochs * state.steps, text)

    @contextmanager
    def reading(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar while files are read; gives a function that takes (done, in all)."""
        yield lambda done, total: self._bar(what, done, total, f"{done}/{total}")

    def table(self, title: str, rows: list[dict[str, str]]) -> None:
        """Print a table: the keys of the first row are its head."""
        # Without lines between the columns, eight of them fit a terminal of 80 characters.
        plain = require("rich.box", "search").SIMPLE_HEAD
        table = require("rich.table", "search").Table(title=title, title_justify="left", box=plain, pad_edge=False)
        for column in rows[0]:
            table.add_column(column, justify="left" if column == next(iter(rows[0])) else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row.values())
        self._console.print(table)

    def _bar(self, name: str, done: int, total: int, text: str) -> None:
        if name != self._shown:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task, self._shown = self._bars.add_task(name, total=total, text=text), name
        self._bars.update(self._task, completed=done, total=total, text=text)
