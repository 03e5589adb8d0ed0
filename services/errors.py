"""Errors that end a command: the message is one line for each mistake, says what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from pydantic import ValidationError


class AnchorageError(Exception):
    """Base of every error that the command line prints as one line; exit code 1."""


class NoSuchRun(AnchorageError):
    """A folder that should hold a run does not."""


class PreflightFailed(AnchorageError):
    """Something is known to be wrong before anything has started. One line for each problem."""


class RedisUnavailable(AnchorageError):
    """Redis cannot be reached, or stayed away longer than `buffer.reconnect_s`."""


class BufferDamaged(RedisUnavailable):
    """A key of the run in Redis holds what the run did not write there."""


class RedisUnsuitable(AnchorageError):
    """This Redis would lose data without an error, or lacks what the buffer needs."""


class ModelUnavailable(AnchorageError):
    """`model.path` holds no model that can be loaded."""


class EnvironmentUnavailable(AnchorageError):
    """The environment server cannot be reached, or is not the one the run names."""


class CheckpointFailed(AnchorageError):
    """A checkpoint could not be written or read."""


class FolderDamaged(CheckpointFailed):
    """A checkpoint or a policy's folder is not as it was written; the message names the file."""


class RunStalled(AnchorageError):
    """No group completed within `learner.group_timeout_s`, or a part of the run kept dying."""


class UpdateNotFinite(AnchorageError):
    """The loss or the gradient of an optimizer step is not finite: it was not taken, and nothing has changed."""


class RunBusy(AnchorageError):
    """The run's folder is in use or cannot be written."""


class RunTaken(RunBusy):
    """Another process runs a run of this name in this Redis."""


class RayUnavailable(AnchorageError):
    """The Ray cluster cannot be started or reached."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`, did you mean NAME?` for the known name that is most like the given one; nothing where none is."""
    close = get_close_matches(given, [*known], n=1)
    return f", did you mean {close[0]}?" if close else ""


def first_line(error: BaseException) -> str:
    """What an error of someone else's says, in one line; of pydantic's, what is wrong first."""
    if isinstance(error, ValidationError):
        return error.errors()[0]["msg"].partition("\n")[0]
    return str(error).strip().partition("\n")[0] or type(error).__name__
