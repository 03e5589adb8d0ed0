"""`anchorage status`: the state of a run, from its folder and its Redis, as a few lines or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from services.control import run_views
from services.control.runs import Run, Runs
from services.errors import NoSuchRun
from services.run_folder import run_config

LISTED_ACTORS = 20


def print_status(folder: Path, *, as_json: bool, console: Console) -> None:
    """Print the state of the run in `folder`.

    Raises:
        NoSuchRun: the folder holds no run.
        ConfigError: its configuration is damaged.
    """
    folder = folder.resolve()
    run_config(folder)
    runs = Runs(folder.parent)
    try:
        run = runs.find(folder.name)
        if run is None:
            raise NoSuchRun(f"no run in {folder}: invalid run name {folder.name!r}")
        facts = collect(run)
    finally:
        runs.close()
    if as_json:
        console.print_json(data=facts)
    else:
        _print(facts, console)


def collect(run: Run) -> dict[str, Any]:
    """Return everything that `status` prints, as JSON-able data."""
    checkpoints = run.checkpoints()
    return {
        "run": run.view().model_dump(),
        "actors": run_views.actors(run).model_dump(exclude={"actors": {"__all__": {"facts"}}}),
        "buffer": run_views.buffer(run).model_dump(),
        "checkpoints": [checkpoint.version for checkpoint in checkpoints],
        "waiting_commands": [c.action for c in run_views.commands(run).commands if c.answer is None],
    }


def _print(facts: dict[str, Any], console: Console) -> None:
    run, buffer, actors = facts["run"], facts["buffer"], facts["actors"]["actors"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("run", f"{run['name']} ({run['algorithm']} on {run['env']})")
    table.add_row("state", f"{run['state']}; {run['note']}")
    table.add_row("updates", f"{run['update']} of {run['updates']}")
    success = (
        f"{_percent(run['success'])} in the last update's episodes, {_percent(run['evaluation'])} in the last panels"
    )
    table.add_row("success", success)
    table.add_row("checkpoints", ", ".join(map(str, facts["checkpoints"])) or "none")
    if run["live"]:
        mib = buffer["trajectory_bytes"] / 2**20
        table.add_row("tickets", f"{buffer['queued']} queued, {buffer['leased']} leased; {mib:.1f} MiB of trajectories")
        table.add_row("actors", f"{facts['actors']['total']}: {facts['actors']['episodes']} episodes")
        for actor in actors[:LISTED_ACTORS]:
            playing = f"version {actor['version']}, {actor['episodes']} episodes, {actor['tokens_per_s']} tokens/s"
            table.add_row(actor["name"], f"{actor['state']}: {playing}, last heartbeat {actor['heard_s']:.0f} s ago")
            if actor["agents"]:
                table.add_row("", _agents(actor["agents"]))
        _print_template(actors, table)
        if facts["waiting_commands"]:
            table.add_row("waiting commands", ", ".join(facts["waiting_commands"]))
    console.print(table, highlight=False)


def _agents(agents: dict[str, Any]) -> str:
    waiting = f", {agents['waiting']} services waiting" if agents["waiting"] else ""
    turn = "" if agents["calls_per_turn"] is None else f", {agents['calls_per_turn']:.1f} calls a turn"
    return (
        f"agents: {agents['playing']} playing in {agents['processes']} processes{waiting}, "
        f"{agents['calls_per_s']:.1f} calls/s{turn}, prompts continued {_percent(agents['extended_fraction'])}, "
        f"short anchors {_percent(agents['short_anchor_fraction'])}; {agents['gateway'] or 'gateway not started'}"
    )


def _print_template(actors: list[dict[str, Any]], table: Table) -> None:
    """What the actors know of the chat template, which is the same for all."""
    told: list[str] = next((actor["agents"]["template"] for actor in actors if actor["agents"]), [])
    if told:
        table.add_row("chat template", "; ".join(told))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
