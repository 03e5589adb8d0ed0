"""Whether a training run starts or resumes: `anchorage train`, `--resume` and `--resume=auto`.

Invariants
- With `--resume` a mistyped name never starts a new training; only `--resume=auto` may do either.
- Nothing is written here, and no weights are read: they are verified when the checkpoint is loaded.
"""

from __future__ import annotations

from enum import StrEnum

from services.config.tree import Config
from services.errors import CheckpointFailed, did_you_mean
from services.run_folder import CHECKPOINTS_NAME, CONFIG_NAME, runs_in


class Resume(StrEnum):
    """The value of `--resume`."""

    NO = "no"
    """Start a new run."""
    YES = "yes"
    """Resume the run, which must exist."""
    AUTO = "auto"
    """Resume the run where it exists, start it otherwise."""


def finished(config: Config) -> str | None:
    """Return a line that says that the run is at its end, with nothing left to do; None if there is something.

    Reads every file of the newest checkpoint if its state says so: a damaged one would be trained again.

    Raises:
        CheckpointFailed: as `check_resumption`.
    """
    from learner import checkpoint
    from learner.panels import is_due
    from learner.record import evaluated_versions

    folder = config.run.folder
    newest = checkpoint.newest_with_state(folder / CHECKPOINTS_NAME)
    if newest is None:
        return None
    state = checkpoint.read_state(newest, config)
    reason = checkpoint.end_reached(config, state.version, state.seconds)
    if reason is None or is_due(config, state.version, evaluated_versions(folder)):
        return None
    if checkpoint.newest_intact(folder / CHECKPOINTS_NAME) != newest:
        return None
    return f"run {config.run.name} is finished: {reason}; raise that to train on, or choose another run.name"


def check_resumption(config: Config, resume: Resume) -> bool:
    """Return whether the run is to be resumed.

    Raises:
        CheckpointFailed: there is no run to resume; a new run would overwrite one; no checkpoint is intact; or the
            newest intact one was written with other settings.
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
