"""`anchorage demo`: evaluate the starter policy, train it with GiGPO, evaluate again, and show the difference.

Every figure it prints or writes was measured in this run.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from anchorage.checks.preflight import Start, preflight
from anchorage.cli import report as report_page
from anchorage.cli.evaluate import as_json, evaluate_on, results_table
from anchorage.cli.report_curves import terminal_curve
from anchorage.runs.stack import Stack, locked, stop_on_signals
from anchorage.runs.training import train_on
from services.config.tree import Config
from services.run_folder import SUMMARY_NAME
from services.telemetry import MetricsWriter

if TYPE_CHECKING:
    from learner.evaluation import EvaluationResult


def run_demo(config: Config, *, console: Console) -> bool:
    """Run the demo; answers whether it came to its end. Leaves `summary.json` and `report.html` in the run's folder."""
    started = time.monotonic()
    preflight(Start(config, models=(config.model.path,), trains=True, plays_panels=True))
    _set_aside(config.run.folder)
    reports: list[Any] = []
    with stop_on_signals() as stopped, Stack(config, announce=console.print) as stack:
        stack.publish_initial()
        starting = _RanksStarting(config)
        try:
            before = evaluate_on(stack, "before training", 0, console=console, should_stop=stopped)
            _record(config, before, 0)
            ranks = starting.result()
            version = train_on(
                stack, ranks, resume=False, console=console, should_stop=stopped, on_report=reports.append
            )
            after = evaluate_on(stack, "after training", version, console=console, should_stop=stopped)
            _record(config, after, version)
        finally:
            starting.stop()
        facts = {"env": config.env.name, "engine": stack.env_engine, "games": stack.env_source}
    if stopped():
        return False
    wall_s = time.monotonic() - started
    figures = _figures(config, facts, before, after, reports, wall_s)
    folder = config.run.folder
    (folder / SUMMARY_NAME).write_text(json.dumps(figures, indent=1) + "\n")
    curve = [(r.update, r.success_rate) for r in reports]
    report_page.write(folder, config)
    console.print(terminal_curve(curve, "success rate of the training episodes, by update"))
    console.print(results_table({"before": before, "after": after}))
    gain, (low, high) = figures["gain_points"], figures["gain_interval_95"]
    console.print(
        f"success on {before.success.episodes} held-out tasks: {100 * before.success.value:.1f} % → "
        f"{100 * after.success.value:.1f} %, {gain:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}) "
        f"after {len(reports)} updates in {wall_s / 60:.1f} minutes; page: {folder / report_page.PAGE_NAME}",
        markup=False,
        soft_wrap=True,
    )
    return True


def _set_aside(folder: Path) -> None:
    """Keep what the last demo left, under another name, so that this one starts from nothing."""
    if not folder.exists():
        return
    with locked(folder):
        previous = folder.with_name(f"{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)


def _record(config: Config, result: EvaluationResult, version: int) -> None:
    with MetricsWriter(config.run.folder, config.telemetry.tensorboard) as metrics:
        metrics.write(version, result.scalars())


class _RanksStarting:
    """The learner's ranks, started in the background while the starter policy is being evaluated."""

    def __init__(self, config: Config) -> None:
        from learner.rank.group import RankGroup

        self._group = RankGroup(config)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._start, name="start ranks", daemon=True)
        self._thread.start()

    def _start(self) -> None:
        try:
            self._group.start()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._group

    def stop(self) -> None:
        self._thread.join()
        self._group.stop()


def _figures(
    config: Config,
    facts: dict[str, str],
    before: EvaluationResult,
    after: EvaluationResult,
    reports: list[Any],
    wall_s: float,
) -> dict[str, Any]:
    from learner.evaluation import difference

    gain = difference(after.success, before.success)
    return {
        **facts,
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
        "wall_s": round(wall_s, 1),
        "before": as_json(before),
        "after": as_json(after),
    }


def default_recipe() -> Path:
    """The demo's recipe in the checkout: for the official games where `ALFWORLD_DATA` names them."""
    name = "demo-official.yaml" if os.environ.get("ALFWORLD_DATA") else "demo.yaml"
    return Path(__file__).resolve().parents[2] / "configs" / name
