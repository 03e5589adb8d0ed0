"""Names of the files in a run's folder that several packages use, and the address of the run's Redis."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from services.config.load import load_config
from services.config.tree import Config
from services.errors import NoSuchRun, RunBusy, did_you_mean
from services.files import write_whole
from services.redis_server import ADDRESS_NAME

CONFIG_NAME = "config.yaml"
CHECKPOINTS_NAME = "checkpoints"
LEDGER_NAME = "ledger.jsonl"
SUMMARY_NAME = "summary.json"
REDIS_NAME = "redis"
WARNINGS_NAME = "warnings.jsonl"
"""Warnings of the trainer, one JSON line each: `update`, `name`, `text`."""
ALGORITHM_NAME = "algorithm.json"
"""What the run's estimator says of itself, see `learner.advantages.description`: the dashboard explains from it."""
AUDIT_NAME = "audit.jsonl"
LINEAGE_NAME = "run.id"
"""Holds the lineage of the run and the identity of its folder."""
WARMSTART_NAME = "warmstart.json"
"""In the folder of a model that `anchorage warmstart` made: how it was made, with the configuration."""


def run_config(folder: Path) -> Config:
    """The configuration of the run in `folder`.

    Raises:
        NoSuchRun: there is none.
        ConfigError: it is damaged.
    """
    if not (folder / CONFIG_NAME).is_file():
        hint = did_you_mean(folder.name, runs_in(folder.parent))
        raise NoSuchRun(f"no run in {folder} (it holds no {CONFIG_NAME}){hint}")
    return load_config(folder / CONFIG_NAME)


def runs_in(folder: Path) -> list[str]:
    """Names of the runs in `folder`."""
    return sorted(found.parent.name for found in folder.glob(f"*/{CONFIG_NAME}"))


def run_of(policy: Path) -> Path | None:
    """The folder of the run in whose checkpoints the policy is, None if it is in none."""
    runs = [above.parent for above in policy.absolute().parents if above.name == CHECKPOINTS_NAME]
    return next((run for run in runs if (run / CONFIG_NAME).is_file()), None)


def lineage(folder: Path, *, resume: bool) -> str:
    """The lineage of the run in `folder`: an id that identifies the run's data in Redis, in addition to its name.

    A new start gets a new lineage; a resumed run keeps its own. A copy of the folder is another run from then on and
    gets a new one, since the data of the original in Redis are not the copy's. The folder is identified by its inode
    and the id of its file system. Unlike the device number, that id usually survives a reboot; it is 0 if the file
    system has none.

    Raises:
        RunBusy: the folder cannot be written.
    """
    path, place = folder / LINEAGE_NAME, _place(folder)
    try:
        known, _, made_for = path.read_text().strip().partition(" ")
        if resume and known and made_for == place:
            return known
    except (OSError, UnicodeDecodeError):
        pass
    new = uuid.uuid4().hex
    try:
        write_whole(path, f"{new} {place}\n")
    except OSError as error:
        raise RunBusy(f"cannot write the run's folder {folder}: {error.strerror} (run.dir, run.name)") from None
    return new


def _place(folder: Path) -> str:
    """Identity of the folder, which does not change if it is moved within its file system."""
    return f"{folder.stat().st_ino}@{os.statvfs(folder).f_fsid:x}"


def redis_url(folder: Path, config: Config, environment: Mapping[str, str] = os.environ) -> str | None:
    """Address of the Redis that the run uses or used; None if that was its own, which has ended."""
    if config.buffer.redis_url:
        return config.buffer.redis_url
    try:
        return (folder / REDIS_NAME / ADDRESS_NAME).read_text().strip() or None
    except OSError:
        return environment.get("REDIS_URL")
