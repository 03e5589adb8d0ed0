"""Connects to the buffer of a run that another process drives, for commands that inspect or change it."""

from __future__ import annotations

import re
from pathlib import Path

from services.buffer import Buffer
from services.config import load_config
from services.config.tree import NAME_PATTERN, BufferConfig, Config
from services.errors import NoSuchRun, RedisUnavailable
from services.run_folder import CONFIG_NAME, redis_url, run_config

PATIENCE_S = 3.0


def attach(run: str | None, folder: Path) -> tuple[str, Buffer]:
    """Return the run's name and its buffer.

    Args:
        run: its name, or its folder as in `runs/demo`. None: the run in `folder` that was started last.
        folder: holds the runs, if `run` is a name.

    Raises:
        NoSuchRun: there is no such run.
        RedisUnavailable: its Redis does not respond.
    """
    given = Path(run or _newest(folder))
    if given.name != str(given):
        folder = given.parent
    name = given.name
    if not re.fullmatch(NAME_PATTERN, name):
        raise NoSuchRun(f"invalid run name: {str(given)!r}")
    patience = BufferConfig(timeout_s=PATIENCE_S, reconnect_s=PATIENCE_S)
    try:
        return name, Buffer.connect(_address(folder / name), name, patience)
    except ValueError as error:
        raise RedisUnavailable(str(error)) from None


def _newest(folder: Path) -> str:
    configs = sorted(folder.glob(f"*/{CONFIG_NAME}"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise NoSuchRun(f"no run in {folder}; give the folder of the runs with --dir")
    return configs[-1].parent.name


def _address(folder: Path) -> str:
    recipe = folder / CONFIG_NAME
    url = redis_url(folder, load_config(recipe) if recipe.exists() else Config())
    if url is None:
        run_config(folder)
        raise RedisUnavailable(
            f"the Redis of run {folder.name} is not running: start the run, or set REDIS_URL to its Redis"
        )
    return url
