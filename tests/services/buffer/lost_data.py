"""A Redis that comes back with older data, as after a crash: all keys of a run, taken and put back."""

from __future__ import annotations

from services.buffer import Buffer
from services.buffer.keys import NAMES


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
