"""Shows the progress of long work: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from anchorage.runs.progress import Progress as Report

PLAIN_EVERY_S = 10.0


class Display:
    """Shows what a run reports: a line for each part that is started, and a bar for work that is counted.

    Pass it as `on_progress`, within its `with` block.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._open = ExitStack()
        self._title: str | None = None
        self._show: Callable[[int, str], None] = lambda done, text: None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __call__(self, report: Report) -> None:
        """Show one report; one of another title ends the bar that is there."""
        if report.total == 0:
            self._end()
            self._console.print(report.text, highlight=False, markup=False, soft_wrap=True)
            return
        if report.title != self._title:
            self._end()
            self._title = report.title
            self._show = self._open.enter_context(bar(self._console, report.title, report.total, report.unit))
        if report.text:  # the report that opens the work has none
            self._show(report.done, report.text)

    def _end(self) -> None:
        self._open.close()
        self._title = None


@contextmanager
def bar(console: Console, title: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    """Yield a function that takes the work done so far and a short text on its state."""
    if not console.is_terminal:
        yield _plain(console, title, total, unit)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, text="")
        yield lambda done, text: progress.update(task, completed=done, text=text)


def _plain(console: Console, title: str, total: int, unit: str) -> Callable[[int, str], None]:
    first: tuple[float, int] | None = None
    last = 0.0

    def show(done: int, text: str) -> None:
        nonlocal first, last
        now = time.monotonic()
        first = first or (now, done)
        if done >= total or now - last >= PLAIN_EVERY_S:
            last = now
            eta = remaining(now - first[0], done - first[1], total - done)
            line = f"{title}: {done}/{total} {unit}  eta {eta}  {text}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    return show


def remaining(seconds: float, done: int, left: int) -> str:
    """Return the time that `left` will take when `done` took `seconds`, as h:mm:ss; dashes while it is unknown."""
    if left <= 0:
        return "0:00:00"
    if done <= 0:
        return "-:--:--"
    minutes, rest = divmod(round(seconds / done * left), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
