"""Passes an admin's action to the run through Redis, and records the action and its result in the audit log.

Invariants
- Every attempt has a line in the audit log, also a refused one; every accepted one gets a second line with its result,
  or that there was none in time.
- The number of tasks that wait for results is bounded by the number of commands that may wait in Redis, and each waits
  at most `ANSWER_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid

from fastapi import HTTPException

from services.buffer.commands import Answer, Command
from services.control.access import Caller, Role
from services.control.audit import Audit, AuditUnwritable
from services.control.live import Live
from services.control.requests import PlainAction, ScaleAction
from services.control.runs import Run
from services.errors import RedisUnavailable

ANSWER_S = 3600.0
POLL_S = 1.0

log = logging.getLogger(__name__)


class Actions:
    """The actions of one control plane. Call `close` when it stops."""

    def __init__(self) -> None:
        self._watching: set[asyncio.Task[None]] = set()

    async def act(self, run: Run, caller: Caller, asked: PlainAction | ScaleAction) -> Command:
        """Pass an action to the run and return the command that waits there.

        Raises:
            HTTPException: 403: no admin. 409: the run is not live, or too many commands wait. 503: the audit log cannot
                be written.
        """
        actors = asked.actors if isinstance(asked, ScaleAction) else None
        command = Command(id=uuid.uuid4().hex, action=asked.action, by=str(caller), at=time.time(), actors=actors)
        audit = Audit(run.folder)
        try:
            refusal = await asyncio.to_thread(_pass_on, run, caller, command)
            result = "requested" if refusal is None else f"refused: {refusal.detail}"
            await asyncio.to_thread(_note, audit, command, result)
        except AuditUnwritable as error:
            raise HTTPException(503, str(error)) from None
        if refusal is not None:
            raise refusal
        assert run.live is not None
        run.live.refresh()
        self._watch(run.live, audit, command)
        return command

    async def close(self) -> None:
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)

    def _watch(self, live: Live, audit: Audit, command: Command) -> None:
        task = asyncio.create_task(_record_answer(live, audit, command))
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)


def _pass_on(run: Run, caller: Caller, command: Command) -> HTTPException | None:
    """Put the command into Redis; returns the refusal if it is not allowed or possible."""
    if caller.role is not Role.ADMIN:
        return HTTPException(403, "the read token does not allow actions: use the admin token")
    buffer = run.live.buffer() if run.live is not None else None
    if buffer is None:
        return HTTPException(409, "the run is not live: no process would execute the action")
    # The line comes first: an action that cannot be recorded is not executed.
    _note(Audit(run.folder), command, "passing to the run")
    try:
        if not buffer.commands.request(command):
            return HTTPException(409, "too many commands are waiting: is the trainer running?")
        if command.actors is not None:
            buffer.set_desired_actors(command.actors)
            text = f"requested {command.actors} rollout actors"
            buffer.commands.answer(command.id, Answer(at=time.time(), done=True, text=text))
    except RedisUnavailable:
        return HTTPException(409, "the run is not live: its Redis does not respond")
    return None


async def _record_answer(live: Live, audit: Audit, command: Command) -> None:
    deadline = time.monotonic() + ANSWER_S
    result = "no result: the control plane stopped before it came"
    try:
        while True:
            await asyncio.sleep(POLL_S)
            snapshot = await asyncio.to_thread(live.snapshot)
            known = {} if snapshot is None else {found.id: found for found in snapshot.commands}
            answer = known[command.id].answer if command.id in known else None
            if answer is not None:
                result = f"{'done' if answer.done else 'not done'}: {answer.text}"
                return
            if time.monotonic() > deadline or snapshot is None:
                result = "no result: the run ended" if snapshot is None else "no result in time"
                return
    finally:
        with contextlib.suppress(AuditUnwritable):
            _note(audit, command, result)


def _note(audit: Audit, command: Command, result: str) -> None:
    audit.note(command.by, command.action, result, actors=command.actors, command=command.id)
