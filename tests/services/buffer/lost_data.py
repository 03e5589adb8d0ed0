"""What befalls a run: Redis comes back with older data, its clock is set, another process takes the run."""

from __future__ import annotations

import uuid

from services.buffer import Buffer
from services.buffer.keys import NAMES
from services.buffer.owner import RECORD, Owner, Record


def save_run(buffer: Buffer) -> dict[str, bytes]:
    """Every key of the run with its value as Redis itself writes it."""
    pipe = buffer._client.pipeline(transaction=True)
    keys = buffer._keys.of(NAMES)
    for key in keys:
        pipe.dump(key)
    return {key: value for key, value in zip(keys, pipe.execute(), strict=True) if value is not None}


def restore_run(buffer: Buffer, saved: dict[str, bytes]) -> None:
    """Go back to `saved`; nothing saved: everything is lost."""
    pipe = buffer._client.pipeline(transaction=True)
    pipe.delete(*buffer._keys.of(NAMES))
    for key, value in saved.items():
        pipe.restore(key, 0, value)
    pipe.execute()


def delete_run(buffer: Buffer) -> None:
    restore_run(buffer, {})


def set_clock(buffer: Buffer, seconds: int) -> None:
    """Redis' clock steps by so many seconds: all that is known of it is how far it went since the run read it last."""
    if buffer._client.exists(buffer._keys["clock"]):
        buffer._client.hincrby(buffer._keys["clock"], "server", -1000 * seconds)


def take_over(buffer: Buffer) -> None:
    """Make every call of `buffer` in the name of the owner, whichever process owns the run."""
    record = RECORD.dump_json(Record.here(600.0)).decode()
    token = buffer.take(buffer.owner(), uuid.uuid4().hex, "lineage", record)
    assert token is not None
    buffer.own(Owner(token, "lineage", record))
