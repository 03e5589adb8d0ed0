"""The demo: evaluates the starter policy, trains it with GiGPO, and evaluates it again on the same tasks.

Every figure was measured in this run.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorage.checks.preflight import Start, preflight
from anchorage.runs.evaluation import as_record, evaluate_on
from anchorage.runs.progress import OnProgress, ShouldStop, announcer
from anchorage.runs.stack import Stack, locked
from anchorage.runs.training import train_on
from services.config.tree import Config
from services.run_folder import SUMMARY_NAME
from services.telemetry import open_metrics

if TYPE_CHECKING:
    from learner.evaluation import EvaluationResult
    from learner.rank.group import RankGroup
    from learner.report import UpdateReport


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        before / after: the evaluations on the same held-out tasks.
        reports: one an update, in their order.
        figures: the content of the run's `summary.json`: the gain in percentage points with its 95 % interval, both
            evaluations, and the settings that they depend on.
    """

    before: EvaluationResult
    after: EvaluationResult
    reports: list[UpdateReport]
    figures: dict[str, Any]


def run_demo(config: Config, *, on_progress: OnProgress, should_stop: ShouldStop) -> DemoResult | None:
    """Run the demo and write `summary.json` into the run's folder. None: it was stopped before its end.

    What an earlier demo left in the folder is moved to `NAME.previous`.

    Raises:
        AnchorageError: as `preflight`, the stack, the evaluation and the trainer raise it.
    """
    started = time.monotonic()
    preflight(Start(config, models=(config.model.path,), trains=True, plays_panels=True))
    _set_aside(config.run.folder, announcer(on_progress))
    reports: list[UpdateReport] = []
    with Stack(config, announcer(on_progress)) as stack:
        stack.channel.announce_initial()
        starting = _RanksStarting(stack)
        try:
            before = _evaluate(stack, "before training", 0, on_progress, should_stop)
            ranks = starting.result()
            version = train_on(
                stack, ranks, resume=False, on_progress=on_progress, should_stop=should_stop, on_report=reports.append
            )
            after = _evaluate(stack, "after training", version, on_progress, should_stop)
        finally:
            starting.stop()
        facts = {"env": config.env.name, "engine": stack.env_engine, "games": stack.env_source}
    if should_stop():
        return None
    figures = facts | _figures(config, before, after, reports) | {"wall_s": round(time.monotonic() - started, 1)}
    (config.run.folder / SUMMARY_NAME).write_text(json.dumps(figures, indent=1) + "\n")
    return DemoResult(before, after, reports, figures)


def _evaluate(
    stack: Stack, title: str, version: int, on_progress: OnProgress, should_stop: ShouldStop
) -> EvaluationResult:
    """Play the panel with policy `version` and record its figures in the run's metrics."""
    result = evaluate_on(stack, title, version, on_progress=on_progress, should_stop=should_stop)
    with open_metrics(stack.config.run.folder, stack.config.telemetry) as metrics:
        metrics.write(version, result.scalars())
    return result


def _set_aside(folder: Path, announce: Callable[[str], None]) -> None:
    """Rename the folder of the last demo, so that this one starts from nothing. The one before it is deleted."""
    if not folder.exists():
        return
    with locked(folder):
        previous = folder.with_name(f"{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    announce(f"the last demo is in {previous} now")


class _RanksStarting:
    """The learner's ranks, started in the background while the starter policy is being evaluated."""

    def __init__(self, stack: Stack) -> None:
        from learner.card_turns import learner_ranks

        self._group = learner_ranks(stack.config, stack.buffer)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._start, name="start ranks", daemon=True)
        self._thread.start()

    def _start(self) -> None:
        try:
            self._group.start()
        except BaseException as error:
            self._error = error

    def result(self) -> RankGroup:
        """Wait for the ranks and return them. Raises what their start raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._group

    def stop(self) -> None:
        self._thread.join()
        self._group.stop()


def _figures(
    config: Config, before: EvaluationResult, after: EvaluationResult, reports: list[UpdateReport]
) -> dict[str, Any]:
    from learner.evaluation import difference

    gain = difference(after.success, before.success)
    return {
        "algorithm": config.algorithm,
        "split": before.split,
        "evaluation_episodes": before.success.episodes,
        "evaluation_temperature": config.evaluation.temperature,
        "success_before": before.success.value,
        "success_after": after.success.value,
        "gain_points": 100 * gain.value,
        "gain_interval_95": [100 * gain.low, 100 * gain.high],
        "episodes": sum(report.episodes for report in reports),
        "updates": len(reports),
        "before": as_record(before),
        "after": as_record(after),
    }


def default_recipe() -> Path:
    """Return the demo's recipe: for the official games where `ALFWORLD_DATA` names them."""
    return Path("configs", "demo-official.yaml" if os.environ.get("ALFWORLD_DATA") else "demo.yaml")
