"""Commands to a run while it trains (see `services.buffer.commands`), carried out between updates.

Invariants
- Every command gets exactly one reply. Commands sent before the run started are refused: their senders no longer wait.
- A paused run issues no tickets and starts no update; `resume` continues it, `stop` ends it.
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
    """A command was started but not completed; the message is one line for people."""


class Commands:
    """Carries out the commands to one run.

    Args:
        buffer: where commands arrive and replies go.
        work: what the trainer does for an action; returns one line for people, or raises CheckpointFailed or NotDone,
            whose message is the reply.
        should_stop: asked while paused.
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
        """Whether `stop` was received."""
        return self._stopped

    def refuse_old(self) -> None:
        """Refuse the commands sent before this run started."""
        for command in self._buffer.commands.waiting():
            self._reply(command, False, "the run had not started when the command was sent")

    def waiting(self) -> bool:
        """Whether there are commands for `carry_out`."""
        return any(command.action is not Action.SCALE for command in self._buffer.commands.waiting())

    def carry_out(self) -> None:
        """Carry out all commands. While paused, blocks and continues to carry them out."""
        self._carry_out_waiting()
        if not self._paused:
            return
        self._buffer.set_state("paused")
        log.info("paused")
        while self._paused and not self._stopped and not self._should_stop():
            time.sleep(POLL_S)
            self._carry_out_waiting()
        self._buffer.set_state("running")

    def _carry_out_waiting(self) -> None:
        for command in self._buffer.commands.waiting():
            if command.action is not Action.SCALE:  # for the pool
                log.info("command %s from %s", command.action, command.by)
                self._reply(command, *self._do(command.action))

    def _do(self, action: Action) -> tuple[bool, str]:
        match action:
            case Action.PAUSE:
                self._paused = True
                return True, "paused: issued tickets are still played, no update starts"
            case Action.RESUME:
                self._paused = False
                return True, "running"
            case Action.STOP:
                self._stopped = True
                return True, "stopping after a checkpoint"
        try:
            return True, self._work[action]()
        except (CheckpointFailed, NotDone) as error:
            return False, str(error)

    def _reply(self, command: Command, done: bool, text: str) -> None:
        self._buffer.commands.answer(command.id, Answer(at=time.time(), done=done, text=text))
