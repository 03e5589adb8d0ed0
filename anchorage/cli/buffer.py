"""`anchorage buffer …`: shows the content of a run's buffer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from anchorage.cli.attach import attach
from anchorage.cli.output import literal_console
from services.buffer import BufferStats, GroupContents, TicketContents
from services.buffer.owner import Found

Run = Annotated[str | None, typer.Argument(help="Name of the run, or its folder. None: the one started last.")]
RunsFolder = Annotated[Path, typer.Option("--dir", help="Folder that holds the runs.")]

app = typer.Typer(no_args_is_help=True, help="The buffer of a run.")


@app.callback()
def buffer() -> None:
    """The buffer of a run."""


@app.command()
def inspect(
    run: Run = None,
    folder: RunsFolder = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show all tickets and trajectories. Example: anchorage buffer inspect demo"""
    name, found = attach(run, folder)
    try:
        stats, groups, actors = found.stats(), found.contents(), found.actors()
        owner = found.owner()
        facts = {"run": name, "state": found.state(), "desired_actors": found.desired_actors(), "owner": _owner(owner)}
    finally:
        found.close()
    if as_json:
        body = {**facts, **_totals(stats), "actors": actors, "groups": [_plain(group) for group in groups]}
        typer.echo(json.dumps(body, indent=2))
        return
    console = literal_console()
    console.print(
        f"run {name}: {stats.queued} tickets queued, {stats.leased} leased by {len(actors)} actors, "
        f"{stats.trajectory_bytes / 2**20:.1f} of {stats.cap_bytes / 2**20:.0f} MiB"
    )
    console.print(f"owned by {_owner(owner)}", highlight=False)
    console.print(_table(groups))


def _owner(owner: Found | None) -> str:
    """Return who owns the run."""
    if owner is None or owner.released:
        return "nobody"
    return str(owner.record or "an unknown process")


def _totals(stats: BufferStats) -> dict[str, object]:
    return {"queued": stats.queued, "leased": stats.leased, "trajectory_bytes": stats.trajectory_bytes}


def _plain(group: GroupContents) -> dict[str, object]:
    return {**asdict(group), "nbytes": group.nbytes}


def _table(groups: Sequence[GroupContents]) -> Table:
    table = Table("stream", "group", "state", "waiting", "leased", "stored", "KiB", "failed", "where", box=None)
    for group in groups:
        count = {place: sum(t.place == place for t in group.tickets) for place in ("waiting", "leased", "stored")}
        table.add_row(
            group.stream,
            str(group.group),
            group.state,
            *(str(count[place]) for place in count),
            f"{group.nbytes / 1024:.1f}",
            str(sum(ticket.attempts for ticket in group.tickets)),
            group.reason or _holders(group.tickets),
        )
    return table


def _holders(tickets: Sequence[TicketContents]) -> str:
    """Return the holders of leases with their numbers, and the seconds left of each holder's shortest lease."""
    leases: dict[str, list[float]] = {}
    for ticket in tickets:
        if ticket.holder is not None and ticket.lease_s is not None:
            leases.setdefault(ticket.holder, []).append(ticket.lease_s)
    return ", ".join(f"{actor}: {len(left)} ({min(left):.0f} s)" for actor, left in sorted(leases.items()))
