"""Progress of long work: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from learner.report import UpdateReport

PLAIN_EVERY_S = 10.0


@contextmanager
def bar(console: Console, title: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    """Yields a function that takes the work done so far and a short text on how it goes."""
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

    def tell(done: int, text: str) -> None:
        nonlocal first, last
        now = time.monotonic()
        first = first or (now, done)
        if done >= total or now - last >= PLAIN_EVERY_S:
            last = now
            eta = remaining(now - first[0], done - first[1], total - done)
            line = f"{title}: {done}/{total} {unit}  eta {eta}  {text}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    return tell


def remaining(seconds: float, done: int, left: int) -> str:
    """The time that `left` will take when `done` took `seconds`, as h:mm:ss; dashes while nobody can know."""
    if left <= 0:
        return "0:00:00"
    if done <= 0:
        return "-:--:--"
    minutes, rest = divmod(round(seconds / done * left), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def summary(report: UpdateReport, episodes: int) -> str:
    """An update in a few words; `episodes` were trained on so far."""
    return (
        f"{episodes} episodes  "
        f"success {report.success_rate:.2f}  valid {report.valid_fraction:.2f}  steps {report.mean_steps:.1f}  "
        f"step groups of {report.step_group_size_mean:.1f}  staleness {report.staleness_mean:.1f}  "
        f"{report.tokens_per_second:.0f} tok/s  waited {report.timings.wait:.1f} s, "
        f"updated {report.timings.update:.1f} s"
    )


def play_summary(won: int, ended: int, tokens_per_s: float | None = None) -> str:
    """An evaluation so far in a few words; `ended` are the episodes that count."""
    success = f"success so far {won / ended:.2f}" if ended else "no episode ended yet"
    return success if tokens_per_s is None else f"{success}  {tokens_per_s:.0f} tok/s"
