"""`anchorage demo`: shows the demo's progress, its learning curve, its results, and writes its page."""

from __future__ import annotations

from rich.console import Console

from anchorage.cli import report as report_page
from anchorage.cli.evaluate import results_table
from anchorage.cli.progress import Display
from anchorage.cli.report_curves import terminal_curve
from anchorage.cli.signals import stop_on_signals
from anchorage.runs import demo
from services.config.tree import Config


def run_demo(config: Config, *, console: Console) -> bool:
    """Run the demo and return whether it reached its end. Leaves `summary.json` and `report.html` in the run's folder.

    Raises:
        AnchorageError: as `anchorage.runs.demo.run_demo`.
    """
    with stop_on_signals() as stopped, Display(console) as display:
        result = demo.run_demo(config, on_progress=display, should_stop=stopped)
    if result is None:
        return False
    page = report_page.write(config.run.folder, config)
    curve = [(report.update, report.success_rate) for report in result.reports]
    console.print(terminal_curve(curve, "success rate of the training episodes, by update"))
    console.print(results_table({"before": result.before, "after": result.after}))
    before, after, figures = result.before.success, result.after.success, result.figures
    gain, (low, high) = figures["gain_points"], figures["gain_interval_95"]
    console.print(
        f"success on {before.episodes} held-out tasks: {100 * before.value:.1f} % → {100 * after.value:.1f} %, "
        f"{gain:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}) "
        f"after {len(result.reports)} updates in {figures['wall_s'] / 60:.1f} minutes; page: {page}",
        markup=False,
        soft_wrap=True,
    )
    console.print(
        f"next: `anchorage control {config.run.dir}` shows its episodes and anchor states, "
        "README.md lists the other commands",
        markup=False,
        soft_wrap=True,
    )
    return True
