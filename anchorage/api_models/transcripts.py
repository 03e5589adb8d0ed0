"""Writes what API models were sent and answered to a file: one JSON object an episode, as the episode ends.

The keys of an episode and of its steps are those of exported episodes (docs/episodes-format.md) as far as they apply.

Invariants
- A line is complete when it is written, and stays where the evaluation ends early.
- No request header is written, so no key.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from anchorage.api_models.wire import chat_messages
from services.errors import AnchorageError
from services.schemas import Ticket, Trajectory

if TYPE_CHECKING:
    from anchorage.api_models.play import Call

SCHEMA = 1


class Transcripts:
    """A file for the transcripts of an evaluation; None: nothing is written.

    Use it within its `with` block. The first episode replaces what was there: an evaluation that a wrong key ends
    leaves the transcripts of an earlier one.

    Raises:
        AnchorageError: the file cannot be written.
    """

    def __init__(self, file: Path | None) -> None:
        self._path = file
        self._file: IO[str] | None = None
        self._lock = threading.Lock()
        self._begun = False

    def __enter__(self) -> Transcripts:
        if self._path is not None:
            try:
                self._file = self._path.open("a", encoding="utf-8")
            except OSError as error:
                raise self._unwritable(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    async def write(
        self,
        policy: str,
        ticket: Ticket,
        calls: Sequence[Call],
        trajectory: Trajectory | None = None,
        *,
        reason: str | None = None,
    ) -> None:
        """Write one episode.

        Args:
            policy: that played it.
            ticket: of the episode.
            calls: all requests, in their order; those of attempts that were started again come first.
            trajectory: the episode; None: it was cancelled.
            reason: why it was cancelled.
        """
        if self._file is not None:
            record = _episode(policy, ticket, calls, trajectory, reason)
            await asyncio.to_thread(self._append, json.dumps(record, default=str) + "\n")

    def _append(self, line: str) -> None:
        with self._lock:
            if self._file is None:  # closed by a stop
                return
            try:
                if not self._begun:
                    self._file.truncate(0)
                    self._begun = True
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> AnchorageError:
        return AnchorageError(f"cannot write {self._path}: {error.strerror or error}")


def _episode(
    policy: str, ticket: Ticket, calls: Sequence[Call], trajectory: Trajectory | None, reason: str | None
) -> dict[str, Any]:
    steps = () if trajectory is None else trajectory.steps
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "policy": policy,
        "group": ticket.group,
        "env": ticket.task.env,
        "split": ticket.task.split,
        "index": ticket.task.index,
        "seed": ticket.seed,
        "temperature": ticket.temperature,
        "cancelled": reason,
    }
    if trajectory is not None:
        record |= {
            "task_type": str(trajectory.facts.get("task_type", "")),
            "started_at": trajectory.started_at,
            "finished_at": trajectory.finished_at,
            "won": trajectory.won,
            "reward": sum(step.reward for step in steps),
            "facts": dict(trajectory.facts),
        }
    last = calls[len(calls) - len(steps) :] if steps else calls
    record["steps"] = [_call(number, call) for number, call in enumerate(last)]
    for entry, step in zip(record["steps"], steps, strict=bool(steps)):
        entry |= {
            "observation": step.observation,
            "action": step.action,
            "reward": step.reward,
            "valid": step.valid,
            "terminated": step.terminated,
            "truncated": step.truncated,
            "prompt_truncated": step.prompt_truncated,
        }
    return record


def _call(number: int, call: Call) -> dict[str, Any]:
    sent: dict[str, Any]
    sent = {"prompt": call.prompt} if isinstance(call.prompt, str) else {"messages": chat_messages(call.prompt)}
    reply = call.reply
    return {
        "number": number,
        **sent,
        "response": reply.text,
        "finished": reply.finished,
        "refused": reply.refused,
        "tokens_in": reply.tokens_in,
        "tokens_out": reply.tokens_out,
        "seconds": round(call.seconds, 3),
    }
