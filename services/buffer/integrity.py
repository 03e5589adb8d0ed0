"""Check of a run's keys in Redis: names the first invalid value in one line, after a failed call and before a resume.

Invariants
- Nothing is changed here. If the check itself cannot read a key, that is its result, never another error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson
from redis import Redis, exceptions

from services.buffer.commands import Answer, Command
from services.buffer.keys import KINDS, MAX_GROUP_SIZE, Keys
from services.errors import BufferDamaged, first_line
from services.schemas import Ticket

_NAME = rb"[A-Za-z0-9][A-Za-z0-9._-]*"
_GROUP = re.compile(rb"[01] " + _NAME + rb" \d{12}")
_TICKET = re.compile(_GROUP.pattern + rb" \d{6}")
_STREAM = re.compile(_NAME)
_STREAM_STATE = re.compile(_NAME + rb" (?:known|complete|cancelled)")
_WHOLE = re.compile(rb"-?\d{1,18}")
_SHOWN_CHARS = 60
_LARGEST_SCORE = 2**53
"""Above it, a double cannot represent one millisecond more."""

Check = Callable[[bytes], bool]


def _is_object(text: bytes) -> bool:
    return isinstance(orjson.loads(text), dict)


def _is_size(text: bytes) -> bool:
    return text.isdigit() and 1 <= int(text) <= MAX_GROUP_SIZE


def _is_text(text: bytes) -> bool:
    text.decode()
    return True


def _is_count(text: bytes) -> bool:
    return text.isdigit() and len(text) < 19


def _is_ticket(text: bytes) -> bool:
    return _TICKET.fullmatch(text) is not None


def _is_group(text: bytes) -> bool:
    return _GROUP.fullmatch(text) is not None


def _is_stream_state(text: bytes) -> bool:
    return _STREAM_STATE.fullmatch(text) is not None


def _is_stream(text: bytes) -> bool:
    return _STREAM.fullmatch(text) is not None


def _is_whole(text: bytes) -> bool:
    return _WHOLE.fullmatch(text) is not None


def _is_ticket_json(text: bytes) -> bool:
    Ticket.model_validate_json(text)
    return True


def _is_command(text: bytes) -> bool:
    Command.model_validate_json(text)
    return True


def _is_answer(text: bytes) -> bool:
    Answer.model_validate_json(text)
    return True


_FIELDS: Mapping[str, tuple[Check, Check]] = {
    "holders": (_is_ticket, _is_text),
    "tickets": (_is_ticket, _is_ticket_json),
    "attempts": (_is_ticket, _is_count),
    "given_up": (_is_ticket, _is_text),
    "sizes": (_is_group, _is_size),
    "counts": (_is_group, _is_count),
    "reasons": (_is_group, _is_text),
    "group_counts": (_is_stream_state, _is_count),
    "changed": (_is_stream, _is_whole),
    "actors": (_is_text, _is_object),
    "actor_heard": (_is_text, _is_whole),
    "commands": (_is_text, _is_command),
    "answers": (_is_text, _is_answer),
    "weights_wishes": (_is_text, _is_object),
}
"""Checks of the fields and values of hashes. Values of `trajectories` are many, and are checked when they are read."""
_MEMBERS: Mapping[str, Check] = {
    "queue": _is_ticket,
    "leases": _is_ticket,
    "complete": _is_group,
    "closed": _is_group,
    "actor_deadlines": _is_text,
    "command_order": _is_text,
}
_TIMES = ("leases", "closed", "actor_deadlines")
"""Sorted sets whose scores are times, or sequences that begin with one; all other scores are 0."""
_VALUES: Mapping[str, Check] = {
    "bytes": _is_whole,
    "begun": _is_group,
    "sequence": _is_whole,
    "manifest": _is_object,
    "state": _is_text,
    "desired_actors": _is_count,
    "weights_announced": _is_object,
    "weights_round": _is_object,
}


def damaged(client: Redis, keys: Keys, error: Exception) -> BufferDamaged:
    """The error to raise instead of `error`, which a call on the run's keys raised."""
    return BufferDamaged(find_damage(client, keys) or f"invalid data of the run in Redis: {first_line(error)}")


def damaged_value(keys: Keys, name: str, value: bytes) -> BufferDamaged:
    """The error to raise for an invalid value of a key."""
    return BufferDamaged(_holds_foreign(keys, name, value))


def find_damage(client: Redis, keys: Keys) -> str | None:
    """One line about the first key that holds what no run writes; None if all are valid."""
    for name, kind in KINDS.items():
        key = keys[name]
        try:
            found = str(client.type(key), "ascii")  # type: ignore[arg-type]
            if found not in (kind, "none"):
                return f"Redis key {key} is a {found}, but a run keeps a {kind} there: {_advice(keys)}"
            wrong = _first_wrong(client, name, key)
        except exceptions.RedisError as error:
            return f"Redis key {key} cannot be read: {first_line(error)}"
        if wrong is not None:
            return _holds_foreign(keys, name, wrong)
    return None


def _holds_foreign(keys: Keys, name: str, value: bytes) -> str:
    found = f"Redis key {keys[name]} (a {KINDS[name]}) holds {_shown(value)}, which no run writes there"
    return f"{found}: {_advice(keys)}"


def _advice(keys: Keys) -> str:
    """Advises to delete all keys: a run cannot continue without one of them, such as `sizes` without `tickets`."""
    return (
        f"another program wrote it; delete all keys {keys.pattern} (what they held is played again), "
        "or give the run another run.name or Redis"
    )


def _first_wrong(client: Any, name: str, key: str) -> bytes | None:
    """An invalid field, member or value of the key, None if there is none."""
    if name == "trajectories":
        return _wrong_of(client.hkeys(key), _is_ticket)
    if name in _FIELDS:
        of_field, of_value = _FIELDS[name]
        found = client.hgetall(key)
        return _wrong_of(found, of_field) or _wrong_of(found.values(), of_value)
    if name in _MEMBERS:
        if KINDS[name] == "list":
            return _wrong_of(client.lrange(key, 0, -1), _MEMBERS[name])
        scores = dict(client.zrange(key, 0, -1, withscores=True))
        return _wrong_of(scores, _MEMBERS[name]) or _wrong_score(scores, name)
    if name in _VALUES:
        value = client.get(key)
        return None if value is None else _wrong_of([value], _VALUES[name])
    if name == "metrics":
        return _wrong_of((fields.get(b"json", b"") for _, fields in client.xrange(key)), _is_object)
    return None  # card, clock and owner are rewritten by the scripts when they are invalid


def _wrong_score(scores: Mapping[bytes, float], name: str) -> bytes | None:
    """A member with an invalid score, and that score."""
    largest = _LARGEST_SCORE if name in _TIMES else 0
    wrong = ((member, score) for member, score in scores.items() if not 0 <= score <= largest)
    return next((b"%b with score %g" % found for found in wrong), None)


def _wrong_of(values: Iterable[bytes], check: Check) -> bytes | None:
    return next((value or b"''" for value in values if not _holds(check, value)), None)


def _holds(check: Check, value: bytes) -> bool:
    try:
        return check(value)
    except ValueError:
        return False


def _shown(value: bytes) -> str:
    text = value.decode(errors="backslashreplace")
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…")
