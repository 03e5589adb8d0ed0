"""What a run reports while it works: one `Progress` a call of the caller's `on_progress`. Nothing is printed here.

Invariants
- `on_progress` is called from the thread that does the work, so it should return quickly. What it raises ends the run
  in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from learner.report import UpdateReport

Stage = Literal["setup", "evaluation", "training"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One report.

    Attributes:
        stage: `setup`: a part is being started, and only `text` is set. `evaluation`, `training`: work that is counted.
        title: name of the work, such as the policy that is evaluated.
        done / total: finished so far, and at most, in `unit`s (`episodes` or `updates`). `total` is 0 during setup.
        text: the state in a few words, for people.
        metrics: figures of the update that was just made, by their names in `metrics.jsonl`; empty otherwise.
    """

    stage: Stage
    title: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    text: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


OnProgress = Callable[[Progress], None]
ShouldStop = Callable[[], bool]


def ignore(progress: Progress) -> None:
    """An `on_progress` that does nothing."""


def never() -> bool:
    """A `should_stop` that lets the run go to its end."""
    return False


def announcer(on_progress: OnProgress) -> Callable[[str], None]:
    """Return a function that reports a line of text as `setup`."""
    return lambda text: on_progress(Progress("setup", text=text))


def update_summary(report: UpdateReport, episodes: int) -> str:
    """Return an update in a few words; `episodes` is the number trained on so far."""
    return (
        f"{episodes} episodes  "
        f"success {report.success_rate:.2f}  valid {report.valid_fraction:.2f}  steps {report.mean_steps:.1f}  "
        f"step groups of {report.step_group_size_mean:.1f}  staleness {report.staleness_mean:.1f}  "
        f"{report.tokens_per_second:.0f} tok/s  waited {report.timings.wait:.1f} s, "
        f"updated {report.timings.update:.1f} s"
    )


def play_summary(won: int, ended: int, tokens_per_s: float | None = None) -> str:
    """Return an evaluation so far in a few words; `ended` is the number of episodes that count."""
    success = f"success so far {won / ended:.2f}" if ended else "no episode ended yet"
    return f"{success}  {tokens_per_s:.0f} tok/s" if tokens_per_s else success
