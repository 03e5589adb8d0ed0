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
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, text="")
        yield lambda done, text: progress.update(task, completed=done, text=text)


def _plain(console: Console, title: str, total: int, unit: str) -> Callable[[int, str], None]:
    last = [0.0]

    def tell(done: int, text: str) -> None:
        now = time.monotonic()
        if done >= total or now - last[0] >= PLAIN_EVERY_S:
            last[0] = now
            console.print(f"{title}: {done}/{total} {unit}  {text}", highlight=False, soft_wrap=True)

    return tell


def summary(report: UpdateReport) -> str:
    """An update in a few words."""
    return (
        f"success {report.success_rate:.2f}  valid {report.valid_fraction:.2f}  steps {report.mean_steps:.1f}  "
        f"step groups of {report.step_group_size_mean:.1f}  staleness {report.staleness_mean:.1f}  "
        f"{report.tokens_per_second:.0f} tok/s  waited {report.timings.wait:.1f} s, "
        f"updated {report.timings.update:.1f} s"
    )
