"""What people ask of a run while it trains (see `services.buffer.commands`), carried out between updates.

Invariants
- Every command gets one answer. Those that were asked for before the run was there are refused: nobody waits for them.
- A paused run issues no tickets and starts no update; it goes on on `resume`, and ends on `stop`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from services.buffer import Buffer
from services.buffer.commands import Action, Answer, Command
from services.errors import CheckpointFailed

POLL_S = 0.5

log = logging.getLogger(__name__)


class NotDone(Exception):
    """What was asked for was begun and not carried to its end; the message is one line for people."""


class Commands:
    """`work` are the actions that the trainer itself carries out, each answering one line for people.

    They may raise CheckpointFailed or NotDone, which is the answer then.
    """

    def __init__(
        self, buffer: Buffer, work: Mapping[Action, Callable[[], str]], should_stop: Callable[[], bool]
    ) -> None:
        self._buffer = buffer
        self._work = work
        self._should_stop = should_stop
        self._paused = False
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Somebody asked to stop."""
        return self._stopped

    def refuse_old(self) -> None:
        """Answer what was asked for before this run began."""
        for command in self._buffer.commands.waiting():
            self._answer(command, False, "the run was not there when this was asked for")

    def waiting(self) -> bool:
        """Something was asked for and `obey` should be called."""
        return any(command.action is not Action.SCALE for command in self._buffer.commands.waiting())

    def obey(self) -> None:
        """Carry out what was asked for; while paused, stay here."""
        self._carry_out()
        if not self._paused:
            return
        self._buffer.set_state("paused")
        log.info("paused")
        while self._paused and not self._stopped and not self._should_stop():
            time.sleep(POLL_S)
            self._carry_out()
        self._buffer.set_state("running")

    def _carry_out(self) -> None:
        for command in self._buffer.commands.waiting():
            if command.action is not Action.SCALE:  # the pool's
                log.info("%s was asked for by %s", command.action, command.by)
                self._answer(command, *self._do(command.action))

    def _do(self, action: Action) -> tuple[bool, str]:
        match action:
            case Action.PAUSE:
                self._paused = True
                return True, "paused: tickets that are out are played, no update begins"
            case Action.RESUME:
                self._paused = False
                return True, "running"
            case Action.STOP:
                self._stopped = True
                return True, "stopping; a checkpoint is left behind"
        try:
            return True, self._work[action]()
        except (CheckpointFailed, NotDone) as error:
            return False, str(error)

    def _answer(self, command: Command, done: bool, text: str) -> None:
        self._buffer.commands.answer(command.id, Answer(at=time.time(), done=done, text=text))
