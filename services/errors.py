"""Errors that end a command. The message has one line per mistake and says what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from pydantic import ValidationError


class AnchorageError(Exception):
    """Base of all errors that the command line prints without a traceback; exit code 1."""


class NoSuchRun(AnchorageError):
    """The folder holds no run."""


class PreflightFailed(AnchorageError):
    """Checks before the start found problems. One line per problem."""


class RedisUnavailable(AnchorageError):
    """Redis cannot be reached, or was unreachable for longer than `buffer.reconnect_s`."""


class BufferDamaged(RedisUnavailable):
    """A key of the run in Redis holds data that no run wrote."""


class RedisUnsuitable(AnchorageError):
    """This Redis would lose data without an error, or lacks a feature that the buffer needs."""


class ModelUnavailable(AnchorageError):
    """No model can be loaded from `model.path`."""


class EnvironmentUnavailable(AnchorageError):
    """The environment server cannot be reached, or serves another environment than the run's."""


class CheckpointFailed(AnchorageError):
    """A checkpoint could not be written or read."""


class FolderDamaged(CheckpointFailed):
    """A file of a checkpoint or policy folder is damaged, missing or foreign; the message names it."""


class RunStalled(AnchorageError):
    """No group completed within `learner.group_timeout_s`, or a process of the run died repeatedly."""


class UpdateNotFinite(AnchorageError):
    """Loss or gradient of an optimizer step is not finite. The step was not taken; nothing has changed."""


class RunBusy(AnchorageError):
    """The run's folder is in use or cannot be written."""


class RunTaken(RunBusy):
    """Another process owns the run of this name in this Redis."""


class RayUnavailable(AnchorageError):
    """The Ray cluster cannot be started or reached."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A hint for an unknown name.

    Example:
        did_you_mean("trian", ["train", "test"]) is ", did you mean train?"
        did_you_mean("xyz", ["train", "test"]) is ""
    """
    close = get_close_matches(given, [*known], n=1)
    return f", did you mean {close[0]}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, of pydantic errors the first mistake; its type if it has no message."""
    if isinstance(error, ValidationError):
        return error.errors()[0]["msg"].partition("\n")[0]
    return str(error).strip().partition("\n")[0] or type(error).__name__
