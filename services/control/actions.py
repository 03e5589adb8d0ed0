"""Carrying what an admin asks for to the run: recorded, put into Redis, and its answer recorded when it comes.

Invariants
- Every attempt has its line in the audit log, a refused one too; every accepted one gets a second line with its answer,
  or with the word that none came.
- What waits for answers is bounded: as many as commands may wait in Redis, each for `ANSWER_S` at most.
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
LOOK_S = 1.0

log = logging.getLogger(__name__)


class Acting:
    """Actions of one control plane. `close` when it ends."""

    def __init__(self) -> None:
        self._watching: set[asyncio.Task[None]] = set()

    async def act(self, run: Run, caller: Caller, asked: PlainAction | ScaleAction) -> Command:
        """Pass it on to the run; the command as it waits there.

        Raises:
            HTTPException: 403 not an admin, 409 the run is not live or has too many commands waiting, 503 no audit.
        """
        actors = asked.actors if isinstance(asked, ScaleAction) else None
        command = Command(id=uuid.uuid4().hex, action=asked.action, by=str(caller), at=time.time(), actors=actors)
        audit = Audit(run.folder)
        try:
            refusal = await asyncio.to_thread(_pass_on, run, caller, command)
            result = "asked for" if refusal is None else f"refused: {refusal.detail}"
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
    """Put the command into Redis, or say why not."""
    if caller.role is not Role.ADMIN:
        return HTTPException(403, "the read token may look, not act: the admin token is needed")
    buffer = run.live.buffer() if run.live is not None else None
    if buffer is None:
        return HTTPException(409, "the run is not live: there is nobody to do it")
    # The line comes first: nothing is done that is not written down.
    _note(Audit(run.folder), command, "passing on")
    try:
        if not buffer.commands.request(command):
            return HTTPException(409, "too many commands wait already: is the trainer there?")
        if command.actors is not None:
            buffer.set_desired_actors(command.actors)
            text = f"wanted now: {command.actors} rollout actors"
            buffer.commands.answer(command.id, Answer(at=time.time(), done=True, text=text))
    except RedisUnavailable:
        return HTTPException(409, "the run's Redis does not answer: the run is not live")
    return None


async def _record_answer(live: Live, audit: Audit, command: Command) -> None:
    deadline = time.monotonic() + ANSWER_S
    result = "no answer: the control plane ended before it came"
    try:
        while True:
            await asyncio.sleep(LOOK_S)
            snapshot = await asyncio.to_thread(live.snapshot)
            known = {} if snapshot is None else {found.id: found for found in snapshot.commands}
            answer = known[command.id].answer if command.id in known else None
            if answer is not None:
                result = f"{'done' if answer.done else 'not done'}: {answer.text}"
                return
            if time.monotonic() > deadline or snapshot is None:
                result = "no answer: the run is gone" if snapshot is None else "no answer in time"
                return
    finally:
        with contextlib.suppress(AuditUnwritable):
            _note(audit, command, result)


def _note(audit: Audit, command: Command, result: str) -> None:
    audit.note(command.by, command.action, result, actors=command.actors, command=command.id)
