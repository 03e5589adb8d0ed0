"""`anchorage eval`: shows the progress of an evaluation, prints its results and writes them to files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from anchorage.api_models.settings import ApiOptions
from anchorage.cli.output import literal_console, require_writable, write_text
from anchorage.cli.progress import Display
from anchorage.cli.signals import stop_on_signals
from anchorage.runs.evaluation import as_record, evaluate_policies
from services.config.tree import Config

if TYPE_CHECKING:
    from learner.evaluation import EvaluationResult, Rate, Usage

PUBLISHED_NAMES = {
    "pick_and_place_simple": "Pick",
    "look_at_obj_in_light": "Look",
    "pick_clean_then_place_in_recep": "Clean",
    "pick_heat_then_place_in_recep": "Heat",
    "pick_cool_then_place_in_recep": "Cool",
    "pick_two_obj_and_place": "Pick2",
}
"""ALFWorld's task types, by the names of the papers' tables."""


def run_evaluation(
    config: Config,
    policies: Sequence[str],
    *,
    json_file: Path | None,
    markdown_file: Path | None,
    console: Console,
    api: ApiOptions | None = None,
) -> bool:
    """Evaluate `policies`, print the table and write the files; return whether all panels were played to their end.

    `api`: options of policies that are API models.

    Raises:
        AnchorageError: a file cannot be written, which is found out before anything is played; or as
            `evaluate_policies`.
    """
    require_writable(json_file, markdown_file, api.transcripts if api is not None else None)
    with stop_on_signals() as stopped:
        with Display(console) as display:
            results = evaluate_policies(config, policies, on_progress=display, should_stop=stopped, api=api)
        console.print(results_table(results))
        if json_file is not None:
            write_text(json_file, json.dumps({name: as_record(r) for name, r in results.items()}, indent=1) + "\n")
        if markdown_file is not None:
            write_text(markdown_file, _markdown(results_table(results)))
        return not stopped()


def results_table(results: Mapping[str, EvaluationResult]) -> Table:
    """Return the table of success overall, by task type and by panel, with 95 % intervals in brackets.

    It has a column for each result, or for each split of a result that has several.
    """
    results = {title: part for name, result in results.items() for title, part in _by_split(name, result)}
    table = Table("success", *results)
    for kind in sorted({kind for result in results.values() for kind in result.task_types}):
        name = f"{kind} ({PUBLISHED_NAMES[kind]})" if kind in PUBLISHED_NAMES else kind
        table.add_row(name, *(_percent(result.task_types.get(kind)) for result in results.values()))
    table.add_section()
    table.add_row("all tasks", *(_percent(result.success) for result in results.values()), style="bold")
    if any(len(result.panels) > 1 for result in results.values()):
        table.add_row("panels, mean ± deviation", *(_over(r.panels, "panels") for r in results.values()))
    if any(len(result.seeds) > 1 for result in results.values()):
        table.add_row("seeds, mean ± deviation", *(_over(r.seeds, "seeds") for r in results.values()))
    table.add_section()
    table.add_row("mean score", *(_score(result) for result in results.values()))
    table.add_row("mean steps", *(f"{result.mean_steps:.1f}" for result in results.values()))
    table.add_row("valid actions", *(f"{100 * result.valid_fraction:.1f} %" for result in results.values()))
    if any(result.cancelled for result in results.values()):
        table.add_row("cancelled episodes", *(str(result.cancelled) for result in results.values()))
    usages = [result.usage for result in results.values()]
    if any(usages):
        table.add_section()
        for title, shown in _USAGE_ROWS.items():
            cells = ["–" if usage is None else shown(usage) for usage in usages]
            if set(cells) != {"–"}:
                table.add_row(title, *cells)
    return table


_USAGE_ROWS: dict[str, Callable[[Usage], str]] = {
    "tokens in": lambda usage: _tokens(usage.tokens_in, usage),
    "tokens out": lambda usage: _tokens(usage.tokens_out, usage),
    "cost": lambda usage: "–" if usage.cost is None else f"{_at_least(usage)}{_cost(usage.cost)}",
    "not accepted": lambda usage: ", ".join(usage.not_accepted) or "–",
}


def _tokens(count: int, usage: Usage) -> str:
    return f"{_at_least(usage)}{count:,}"


def _cost(cost: float) -> str:
    return f"{cost:,.2f}" if cost >= 1 else f"{cost:.3g}"


def _at_least(usage: Usage) -> str:
    """A sign before figures that lack the responses whose tokens the server did not count."""
    return "≥ " if usage.uncounted else ""


def _by_split(name: str, result: EvaluationResult) -> list[tuple[str, EvaluationResult]]:
    """Return the columns of a result with their titles."""
    return [(f"{name}, {split}", part) for split, part in result.splits.items()] or [(name, result)]


def _percent(rate: Rate | None) -> str:
    if rate is None:
        return "–"
    low, high = rate.interval
    return f"{100 * rate.value:.1f} % ({100 * low:.0f}–{100 * high:.0f}), n = {rate.episodes}"


def _over(parts: Sequence[Rate], what: str) -> str:
    from learner.evaluation import mean

    rates = mean([100 * rate.value for rate in parts])
    return f"{rates.value:.1f} ± {rates.error * rates.count**0.5:.1f} %, {rates.count} {what}"


def _score(result: EvaluationResult) -> str:
    if result.score is None:
        return "–"
    low, high = result.score.interval
    return f"{100 * result.score.value:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def _markdown(table: Table) -> str:
    table.box = box.MARKDOWN
    text = io.StringIO()
    literal_console(text, 400).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip("|- \n")) + "\n"
