"""Ids of sessions: unguessable, and they name the worker process that holds the session, where there are several.

Worker processes are numbered from 1 in the order in which they were started, so a number never comes back.
"""

from __future__ import annotations

import re
import secrets

_PREFIX = re.compile(r"(\d{1,9})\.")
_RANDOM_BITS = 43


def session_prefix(worker: int | None) -> str:
    """What the ids of a worker's sessions begin with."""
    return "" if worker is None else f"{worker}."


def worker_of_session(session: str) -> int | None:
    """The worker that a session's id names."""
    match = _PREFIX.match(session)
    return None if match is None else int(match[1])


def new_number(worker: int | None) -> int:
    """An id that is a number below 2**63, for protocols that want one."""
    return (worker or 0) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)


def worker_of_number(number: int) -> int | None:
    """The worker that such a number names."""
    return number >> _RANDOM_BITS or None
