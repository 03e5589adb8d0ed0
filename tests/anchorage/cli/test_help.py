"""Every command of the tree says in its help how it is used, with an example that begins as one types it."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
import typer
from typer.testing import CliRunner

from anchorage.cli.main import app
from tests.processes import Command


def _leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    commands = getattr(command, "commands", None)
    if commands is None:
        yield path
    else:
        for name, child in commands.items():
            yield from _leaves(child, (*path, name))


LEAVES = sorted(_leaves(typer.main.get_command(app)))


def test_the_tree_is_what_is_promised() -> None:
    tops = {path[0] for path in LEAVES}
    assert {"train", "eval", "env", "buffer", "pool", "status", "report", "control", "export", "demo"} <= tops
    assert {("env", "serve"), ("env", "check"), ("env", "new"), ("buffer", "inspect"), ("pool", "scale")} <= set(LEAVES)


def _help(path: tuple[str, ...]) -> tuple[int, str]:
    """Exit code and output of the command's `--help`."""
    wide = {"COLUMNS": "200", "TERM": "dumb"}
    if path == ("env", "serve"):  # it becomes another program, in the process that it is in
        with Command([*path, "--help"], wide) as command:
            code, out, _ = command.finish(60)
        return code, out
    told = CliRunner().invoke(app, [*path, "--help"], prog_name="anchorage", env=wide)
    return told.exit_code, told.output


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_has_an_example(path: tuple[str, ...]) -> None:
    code, output = _help(path)
    assert code == 0, output
    text = " ".join(output.split())
    assert f"Example: anchorage {' '.join(path)} " in f"{text} "
    assert "usage: " not in text or f"usage: anchorage {' '.join(path)} " in text
