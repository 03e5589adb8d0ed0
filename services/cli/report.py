"""`anchorage report`: a run's tables and curves as one HTML file that stands alone, curves of several as a picture."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.config.load import dump_config
from services.config.tree import Config
from services.errors import AnchorageError
from services.run_folder import SUMMARY_NAME
from services.telemetry import METRICS_NAME

CURVES = {
    "evaluation/success_rate": "success rate on the evaluation panel",
    "rollout/success_rate": "success rate of training episodes",
    "rollout/mean_steps": "steps per episode",
    "rollout/valid_fraction": "share of valid actions",
    "advantage/step_group_size": "mean step-group size",
    "staleness/mean": "staleness (updates)",
    "loss/entropy": "entropy (nats per token)",
    "loss/clip_fraction": "clip fraction",
    "time/tokens_per_second": "learner tokens/s",
}
SMOOTHING = 0.8

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }}
td, th {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left }}
img {{ max-width: 100% }} pre {{ background: #f6f6f6; padding: 1rem; overflow: auto }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""


def write(folder: Path, config: Config) -> Path:
    """Write `report.html` into the run's folder and answer its path.

    Raises:
        AnchorageError: the folder holds no metrics.
    """
    records = read_metrics(folder)
    parts = []
    if (folder / SUMMARY_NAME).exists():
        parts.append(_results_html(json.loads((folder / SUMMARY_NAME).read_text())))
    if records:
        picture = base64.b64encode(_curves_png({config.run.name: records})).decode()
        parts.append(f'<h2>Curves</h2><img alt="curves" src="data:image/png;base64,{picture}">')
    parts.append(f"<h2>Configuration</h2><pre>{html.escape(dump_config(config))}</pre>")
    page = folder / "report.html"
    page.write_text(_PAGE.format(title=html.escape(f"Anchorage run {config.run.name}"), body="".join(parts)))
    return page


def write_picture(folders: Sequence[Path], file: Path) -> None:
    """Draw the curves of one or several runs into a PNG file.

    Raises:
        AnchorageError: a folder holds no metrics, or the file cannot be written.
    """
    picture = _curves_png({folder.name: read_metrics(folder) for folder in folders})
    try:
        file.write_bytes(picture)
    except OSError as error:
        raise AnchorageError(f"cannot write {file}: {error.strerror}") from None


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The records of the run's metrics stream.

    Raises:
        AnchorageError: the folder holds none.
    """
    path = folder / METRICS_NAME
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except OSError:
        raise AnchorageError(f"{folder} holds no {METRICS_NAME}: name the folder of a run that has trained") from None


def terminal_curve(points: Sequence[tuple[int, float]], title: str) -> str:
    """The smoothed curve drawn with characters."""
    import plotext

    if not points:
        return "no update was made"
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(76, 16)
    plotext.title(title)
    plotext.plot([x for x, _ in points], smooth([y for _, y in points]))
    return str(plotext.uncolorize(plotext.build()))


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(average / weight)
    return smoothed


def _curves_png(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """A panel for each of `CURVES` that a run recorded; evaluations as they are, everything else also smoothed."""
    from matplotlib.figure import Figure

    shown = [name for name in CURVES if any(_points(records, name) for records in runs.values())]
    rows = (len(shown) + 1) // 2
    figure = Figure(figsize=(10, 2.6 * max(rows, 1)), layout="constrained")
    axes = figure.subplots(max(rows, 1), 2, squeeze=False).flatten()
    for name, axis in zip(shown, axes, strict=False):
        for number, (run, records) in enumerate(runs.items()):
            points = _points(records, name)
            steps, values = [x for x, _ in points], [y for _, y in points]
            if name.startswith("evaluation/"):
                axis.plot(steps, values, marker="o", color=f"C{number}", label=run)
            else:
                axis.plot(steps, values, alpha=0.25, color=f"C{number}")
                axis.plot(steps, smooth(values), color=f"C{number}", label=run)
        axis.set_title(CURVES[name], fontsize=10)
        axis.set_xlabel("update", fontsize=8)
        axis.grid(alpha=0.3)
        if len(runs) > 1:
            axis.legend(fontsize=8)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _points(records: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]


def _results_html(summary: Mapping[str, Any]) -> str:
    """Success before and after training, overall and by task type."""
    results = {f"{name} training": summary[name] for name in ("before", "after")}
    kinds = sorted({kind for result in results.values() for kind in result["task_types"]})
    head = "".join(f"<th>{html.escape(name)}</th>" for name in results)
    rows = []
    for kind in [*kinds, "all tasks"]:
        rates = (
            result["success"] if kind == "all tasks" else result["task_types"].get(kind) for result in results.values()
        )
        rows.append(f"<tr><td>{html.escape(kind)}</td>{''.join(map(_rate_cell, rates))}</tr>")
    return f"<h2>Success</h2><table><tr><th>task type</th>{head}</tr>{''.join(rows)}</table>"


def _rate_cell(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return "<td>–</td>"
    low, high = rate["interval_95"]
    return f"<td>{100 * rate['rate']:.1f} % ({100 * low:.0f}–{100 * high:.0f}), n = {rate['episodes']}</td>"
