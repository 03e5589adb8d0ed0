"""Whether a training run starts, or resumes one that is there: `anchorage train`, `--resume` and `--resume=auto`.

Invariants
- A name that was mistyped never starts a new training: only `--resume=auto` may do either.
- Nothing is written here, and no weights are read: what a checkpoint holds is verified when it is loaded.
"""

from __future__ import annotations

from enum import StrEnum

from services.config.tree import Config
from services.errors import CheckpointFailed, did_you_mean
from services.run_folder import CHECKPOINTS_NAME, CONFIG_NAME, runs_in


class Resume(StrEnum):
    """What `--resume` asks for."""

    NO = "no"
    """Start a new run."""
    YES = "yes"
    """Resume the run, which must exist."""
    AUTO = "auto"
    """Resume the run where it exists, start it otherwise."""


def check_resumption(config: Config, resume: Resume) -> bool:
    """Whether to resume.

    Raises:
        CheckpointFailed: there is no run to resume, or one is in the way of a new run, or no checkpoint is intact, or
            the newest that is was written with other settings.
    """
    from learner import checkpoint

    folder = config.run.folder
    if resume is Resume.NO:
        checkpoint.require_none(folder / CHECKPOINTS_NAME)
        return False
    exists = (folder / CONFIG_NAME).is_file() or (folder / CHECKPOINTS_NAME).is_dir()
    if not exists and resume is Resume.YES:
        raise CheckpointFailed(
            f"no run to resume in {folder}{did_you_mean(config.run.name, runs_in(config.run.dir))} "
            "(--resume=auto starts it where there is none)"
        )
    newest = checkpoint.newest_with_state(folder / CHECKPOINTS_NAME)
    if newest is not None:
        checkpoint.read_state(newest, config)
    return exists
