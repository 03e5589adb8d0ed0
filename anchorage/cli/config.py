"""`anchorage config …`: the configuration that is in effect, its schema and the reference of its keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from services.config import key_reference, provenance

app = typer.Typer(no_args_is_help=True, help="The configuration tree.")


@app.callback()
def config() -> None:
    """The configuration tree."""


@app.command()
def show(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML), as in configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, as in learner.updates=50.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the values in effect and who set each. Example: anchorage config show configs/demo.yaml algorithm=grpo

    Sources are `default`, `preset ALGORITHM`, a recipe's path and `command line`. Credentials are masked.
    """
    found = provenance.settings(recipe, overrides or ())
    if as_json:
        typer.echo(json.dumps(provenance.record(found), indent=2))
    else:
        typer.echo(provenance.annotated(found), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe. Example: anchorage config schema"""
    typer.echo(json.dumps(key_reference.schema(), indent=2))


@app.command()
def keys() -> None:
    """Print the reference of all keys as Markdown. Example: anchorage config keys"""
    typer.echo(key_reference.page(), nl=False)
