"""`anchorage eval`: plays an evaluation panel with a policy and prints what came of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from services.cli.progress import bar
from services.cli.stack import Stack, stop_on_signals, watched
from services.config.tree import Config
from services.model_folder import check_model_folder

if TYPE_CHECKING:
    from learner.evaluation import EvaluationResult, Rate

LOAD_TIMEOUT_S = 180.0


def run_evaluation(config: Config, *, json_file: Path | None, console: Console) -> None:
    """Evaluate the policy in `model.path` on the panel of `evaluation`."""
    check_model_folder(config.model.path)
    with stop_on_signals() as stopped, Stack(config, announce=console.print) as stack:
        stack.publish_initial()
        result = evaluate_on(stack, "evaluation", 0, console=console, should_stop=stopped)
    console.print(results_table({str(config.model.path): result}))
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(result), indent=1) + "\n")


def evaluate_on(
    stack: Stack, title: str, version: int, *, console: Console, should_stop: Callable[[], bool]
) -> EvaluationResult:
    """Play the panel on a running stack with policy `version`, which must have been published."""
    from learner.evaluation import evaluate

    stack.wait_for_version(version, LOAD_TIMEOUT_S, should_stop)
    with bar(console, title, stack.config.evaluation.episodes, "episodes") as tell:
        return evaluate(
            stack.config,
            stack.buffer,
            stack.splits,
            stream=f"eval-{version:06d}",
            version=version,
            should_stop=watched(stack, should_stop),
            on_progress=lambda done, total: tell(done, ""),
        )


def results_table(results: Mapping[str, EvaluationResult]) -> Table:
    """Success overall and by task type, a column for each result."""
    table = Table("task type", *results)
    kinds = sorted({kind for result in results.values() for kind in result.task_types})
    for kind in kinds:
        table.add_row(kind, *(_percent(result.task_types.get(kind)) for result in results.values()))
    table.add_section()
    table.add_row("all tasks", *(_percent(result.success) for result in results.values()), style="bold")
    table.add_row("mean steps", *(f"{result.mean_steps:.1f}" for result in results.values()))
    table.add_row("valid actions", *(f"{100 * result.valid_fraction:.1f} %" for result in results.values()))
    return table


def as_json(result: EvaluationResult) -> dict[str, object]:
    """The result as plain data, rates with their intervals."""
    record = dataclasses.asdict(result)
    record["success"] = _rate_json(result.success)
    record["task_types"] = {kind: _rate_json(rate) for kind, rate in result.task_types.items()}
    return record


def _rate_json(rate: Rate) -> dict[str, object]:
    return {"won": rate.won, "episodes": rate.episodes, "rate": rate.value, "interval_95": list(rate.interval)}


def _percent(rate: Rate | None) -> str:
    if rate is None:
        return "–"
    low, high = rate.interval
    return f"{100 * rate.value:.1f} % ({100 * low:.0f}–{100 * high:.0f}), n = {rate.episodes}"
