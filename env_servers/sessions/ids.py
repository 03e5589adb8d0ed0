"""Session ids: unguessable, and of several worker processes they name the one that holds the session.

Workers are numbered from 1 in the order of their start, and a number is never reused.

Example: `3.kV9…` is a session of worker 3; without several workers the id is `kV9…`. As a number, worker 3's ids are
`3 << 43 | random`.
"""

from __future__ import annotations

import re
import secrets

_PREFIX = re.compile(r"(\d{1,9})\.")
_RANDOM_BITS = 43


def session_prefix(worker: int | None) -> str:
    """The prefix of all session ids of a worker."""
    return "" if worker is None else f"{worker}."


def worker_of_session(session: str) -> int | None:
    """The worker that a session id names; None if it names none."""
    match = _PREFIX.match(session)
    return None if match is None else int(match[1])


def new_number(worker: int | None) -> int:
    """A new id as a number below 2**63, for protocols that require numbers."""
    return (worker or 0) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)


def worker_of_number(number: int) -> int | None:
    """The worker that an id of `new_number` names; None if it names none."""
    return number >> _RANDOM_BITS or None
