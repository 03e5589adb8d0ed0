"""`anchorage pool …`: sets the size of a run's rollout pool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anchorage.cli.attach import attach
from anchorage.cli.buffer import Run, RunsFolder

MOST_ACTORS = 65_536

app = typer.Typer(no_args_is_help=True, help="The rollout actors of a run.")


@app.callback()
def pool() -> None:
    """The rollout actors of a run."""


@app.command()
def scale(
    actors: Annotated[str, typer.Argument(help="Number of rollout actors; `all`: as many as fit into the cluster.")],
    run: Run = None,
    folder: RunsFolder = Path("runs"),
) -> None:
    """Grow or shrink the pool while it plays. Example: anchorage pool scale 3 demo"""
    if actors != "all" and not (actors.isdecimal() and int(actors) <= MOST_ACTORS):
        raise typer.BadParameter(
            f"actors must be `all` or a number from 0 to {MOST_ACTORS}, got '{actors}'; "
            "as in: anchorage pool scale 3 demo"
        )
    name, found = attach(run, folder)
    try:
        found.set_desired_actors(None if actors == "all" else int(actors))
    finally:
        found.close()
    typer.echo(f"run {name}: requested {actors} rollout actors")
