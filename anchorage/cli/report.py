"""`anchorage report`: writes a run's tables and curves as one self-contained HTML file, curves of several as a PNG.

Invariants
- The file can be sent to others: it holds no credential and loads nothing.
"""

from __future__ import annotations

import base64
import html
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anchorage.cli.output import unwritable, write_text
from anchorage.cli.report_curves import picture
from anchorage.runs.metrics import evaluations, read_metrics
from services.config.load import shown_config
from services.config.tree import Config
from services.run_folder import SUMMARY_NAME

PAGE_NAME = "report.html"
LAST_UPDATES = 10

_log = logging.getLogger(__name__)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
td, th {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left }}
img {{ max-width: 100% }} pre {{ background: #f6f6f6; padding: 1rem; overflow: auto }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


_UPDATE_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "success": ("rollout/success_rate", _percent),
    "reward": ("rollout/mean_reward", "{:.2f}".format),
    "valid": ("rollout/valid_fraction", _percent),
    "steps": ("rollout/mean_steps", "{:.1f}".format),
    "step-group size": ("advantage/step_group_size", "{:.2f}".format),
    "staleness": ("staleness/mean", "{:.2f}".format),
    "KL": ("loss/kl", "{:.4g}".format),
    "clipped": ("loss/clip_fraction", _percent),
    "entropy": ("loss/entropy", "{:.3f}".format),
    "tokens/s": ("time/tokens_per_second", "{:.0f}".format),
}


def write(folder: Path, config: Config) -> Path:
    """Write `report.html` into the run's folder and return its path.

    Raises:
        AnchorageError: the folder holds no metrics, or cannot be written.
    """
    records = read_metrics(folder)
    parts = [_overview(records, config), _results(folder), _evaluations(records), _last_updates(records)]
    if records:
        curves = base64.b64encode(picture({config.run.name: records})).decode()
        parts.append(f'<h2>Curves</h2><img alt="curves" src="data:image/png;base64,{curves}">')
    parts.append(f"<h2>Configuration</h2><pre>{html.escape(shown_config(config))}</pre>")
    page = folder / PAGE_NAME
    title = html.escape(f"Anchorage run {config.run.name}")
    write_text(page, _PAGE.format(title=title, body="".join(parts)))
    return page


def write_picture(folders: Sequence[Path], file: Path) -> None:
    """Draw the curves of one or several runs into a PNG file.

    Raises:
        AnchorageError: a folder holds no metrics, or the file cannot be written.
    """
    drawn = picture({folder.name: read_metrics(folder) for folder in folders})
    try:
        file.write_bytes(drawn)
    except OSError as error:
        raise unwritable(file, error) from None


def _overview(records: Sequence[Mapping[str, Any]], config: Config) -> str:
    done = max((int(record["step"]) for record in records), default=0)
    names = ", ".join(env.name for env in config.environments)
    text = f"{config.algorithm} on {names}, model {config.model.path}: {done} of {config.learner.updates} updates."
    return f"<p>{html.escape(text)}</p>"


def _results(folder: Path) -> str:
    """Return the table of success before and after training; empty where the run has not compared the two."""
    try:
        summary = json.loads((folder / SUMMARY_NAME).read_text())
        results = {
            title: part for name in ("before", "after") for title, part in _by_split(f"{name} training", summary[name])
        }
        kinds = sorted({kind for result in results.values() for kind in result["task_types"]})
        rows = [[kind, *(_rate(result["task_types"].get(kind)) for result in results.values())] for kind in kinds]
        rows.append(["all tasks", *(_rate(result["success"]) for result in results.values())])
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        _log.warning("%s is damaged; the report omits its table", folder / SUMMARY_NAME)
        return ""
    return _table("Success", ["task type", *results], rows)


def _by_split(title: str, result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the columns of a result: one, or one for each of several splits."""
    return [(f"{title}, {split}", part) for split, part in result.get("splits", {}).items()] or [(title, result)]


def _evaluations(records: Sequence[Mapping[str, Any]]) -> str:
    found = list(evaluations(records))
    by_split = {row["update"] for row in found if row["split"] is not None}
    rows = [_evaluation(row) for row in found if row["split"] is not None or row["update"] not in by_split]
    return _table("Evaluations", ["after update", "success", "95 % interval", "score", "steps", "valid"], rows)


def _evaluation(row: Mapping[str, Any]) -> list[str]:
    low, high = row["success_low"], row["success_high"]
    return [
        str(row["update"]) + (f", {row['split']}" if row["split"] else ""),
        _percent(row["success_rate"]),
        "–" if low is None or high is None else f"{_percent(low)} – {_percent(high)}",
        _shown(row["mean_score"], "{:.3f}".format),
        _shown(row["mean_steps"], "{:.1f}".format),
        _shown(row["valid_fraction"], _percent),
    ]


def _last_updates(records: Sequence[Mapping[str, Any]]) -> str:
    updates = [record for record in records if record.get("rollout/success_rate") is not None][-LAST_UPDATES:]
    rows = [
        [str(record["step"]), *(_shown(record.get(name), form) for name, form in _UPDATE_COLUMNS.values())]
        for record in updates
    ]
    return _table("Last updates", ["update", *_UPDATE_COLUMNS], rows)


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return "–" if value is None else form(value)


def _rate(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return "–"
    low, high = rate["interval_95"]
    return f"{100 * rate['rate']:.1f} % ({100 * low:.0f}–{100 * high:.0f}), n = {rate['episodes']}"


def _table(title: str, head: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table as HTML; empty without rows."""
    if not rows:
        return ""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<h2>{html.escape(title)}</h2><table><tr>{top}</tr>{body}</table>"
