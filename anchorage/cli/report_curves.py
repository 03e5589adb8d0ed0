"""Draws the curves of one or several runs as a picture, and of one run as characters."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

Records = Sequence[Mapping[str, Any]]

CURVES = {
    "evaluation/success_rate": "success rate on the evaluation panel",
    "rollout/success_rate": "success rate of training episodes",
    "rollout/mean_reward": "reward per episode",
    "rollout/mean_steps": "steps per episode",
    "rollout/valid_fraction": "share of valid actions",
    "advantage/step_group_size": "mean step-group size",
    "staleness/mean": "staleness (updates)",
    "loss/kl": "KL to the reference policy (nats per token)",
    "loss/entropy": "entropy (nats per token)",
    "loss/clip_fraction": "clip fraction",
    "time/tokens_per_second": "learner tokens/s",
}
STACKS = {
    "step groups by size, share of all": {
        "advantage/step_groups_1": "lone step",
        "advantage/step_groups_2_to_4": "2–4",
        "advantage/step_groups_5_to_8": "5–8",
        "advantage/step_groups_9_up": "9 or more",
    },
    "time of an update (s)": {
        "time/update_s": "update",
        "time/wait_s": "wait",
        "time/prepare_s": "prepare",
        "time/publish_s": "publish",
    },
}
"""Title to parts that add up. Drawn for a single run only: the areas of several would cover each other."""
SMOOTHING = 0.8


def picture(runs: Mapping[str, Records]) -> bytes:
    """Return a PNG with a panel for each figure that a run recorded; curves are smoothed, evaluations are not."""
    from matplotlib.figure import Figure

    curves = [name for name in CURVES if any(points(records, name) for records in runs.values())]
    only = next(iter(runs.values())) if len(runs) == 1 else []
    stacks = [title for title, parts in STACKS.items() if any(points(only, name) for name in parts)]
    rows = max(1, (len(curves) + len(stacks) + 1) // 2)
    figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for title, axis in zip([*curves, *stacks], axes, strict=False):
        if title in STACKS:
            _draw_stack(axis, only, STACKS[title])
        else:
            _draw_curve(axis, runs, title)
        axis.set_title(CURVES.get(title, title), fontsize=10)
        axis.set_xlabel("update", fontsize=8)
        axis.grid(alpha=0.3)
        if len(runs) > 1 or title in STACKS:
            axis.legend(fontsize=8)
    for axis in axes[len(curves) + len(stacks) :]:
        axis.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_curve(axis: Any, runs: Mapping[str, Records], name: str) -> None:
    for number, (run, records) in enumerate(runs.items()):
        found = points(records, name)
        steps, values = [x for x, _ in found], [y for _, y in found]
        if name.startswith("evaluation/"):
            axis.plot(steps, values, marker="o", color=f"C{number}", label=run)
        else:
            axis.plot(steps, values, alpha=0.25, color=f"C{number}")
            axis.plot(steps, smooth(values), color=f"C{number}", label=run)


def _draw_stack(axis: Any, records: Records, parts: Mapping[str, str]) -> None:
    told = [record for record in records if any(record.get(name) is not None for name in parts)]
    values = [[record.get(name) or 0.0 for record in told] for name in parts]
    axis.stackplot([record["step"] for record in told], values, labels=list(parts.values()), alpha=0.8)


def points(records: Records, name: str) -> list[tuple[float, float]]:
    """Return (update, value) of each record that has the figure."""
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]


def smooth(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average, corrected for its start.

    Example:
        smooth([1.0, 0.0])  # [1.0, 0.444…]: weights 0.8 and 1 of the two values, over their sum 1.8
    """
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(average / weight)
    return smoothed


def terminal_curve(curve: Sequence[tuple[int, float]], title: str) -> str:
    """Return the smoothed curve, drawn with characters."""
    import plotext

    if not curve:
        return "no update was made"
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(76, 16)
    plotext.title(title)
    plotext.plot([x for x, _ in curve], smooth([y for _, y in curve]))
    return str(plotext.uncolorize(plotext.build()))
