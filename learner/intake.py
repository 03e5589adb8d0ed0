"""The groups of an update: tickets out, complete groups in, those that cannot be used replaced by others.

Invariants
- Staleness is checked when a group is about to be used. Too old: counted, removed, issued again under its number. One
  that cannot be read (damaged, incomplete, of another version of the code), or in which an episode is not of the ticket
  that the dispatcher computes, fares the same.
- Dynamic sampling drops a group when it is read: it is cancelled in Redis, its slot is free, the next group takes it.
- No wait without an end: a run in which nothing completes, or in which nothing usable does, stops with one clear line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from learner.dispatch import Dispatcher
from learner.dynamic_sampling import EQUAL_REWARDS, Collected, has_equal_rewards
from learner.prefetch import Prefetcher
from learner.report import staleness
from services.buffer import Buffer
from services.codec import CodecError
from services.config.tree import LearnerConfig
from services.errors import RunStalled
from services.schemas import TRAIN_STREAM, Trajectory

POLL_S = 0.5
FULL = "the buffer is full: raise buffer.max_mib, or lower learner.groups_per_update or learner.group_size"

log = logging.getLogger(__name__)


class Intake:
    """Keeps the dispatcher's groups on their way. Raises RunStalled where they do not get anywhere."""

    def __init__(self, config: LearnerConfig, buffer: Buffer, dispatcher: Dispatcher, prefetch: Prefetcher) -> None:
        self._config = config
        self._buffer = buffer
        self._dispatcher = dispatcher
        self._prefetch = prefetch

    def collect(self, version: int, interrupted: Callable[[], bool]) -> Collected | None:
        """The groups of the update of policy `version`; None when interrupted while waiting."""
        collected = Collected()
        quiet_since = time.monotonic()
        while not interrupted():
            if self.look(version, collected):
                return collected
            collected.check_waste(self._config, self._dispatcher.capacity)
            if self._buffer.wait(TRAIN_STREAM, POLL_S):
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > self._config.group_timeout_s:
                raise RunStalled(
                    f"no group completed for {self._config.group_timeout_s:g} s (learner.group_timeout_s); "
                    + (FULL if self._buffer.stats().full else "are the rollout actors and the environment server up?")
                )
        return None

    def look(self, version: int, collected: Collected) -> bool:
        """Take what is there, send out what is missing; True once `collected` holds the whole window, in order."""
        self._buffer.expire()  # the actors do, too; while none is alive this keeps the run's clock going
        self._give_up_cancelled(collected)
        self._issue(version)
        self._read_complete(collected, version)
        window = self._dispatcher.window()
        if not collected.groups.keys() >= set(window):
            return False
        collected.groups = {group: collected.groups[group] for group in window}
        return True

    def _issue(self, version: int) -> None:
        """Send new groups out, and again those that Redis does not know: new, dropped, or lost by it."""
        self._dispatcher.advance(self._config.updates - version)
        missing = self._dispatcher.missing(self._buffer.known(TRAIN_STREAM))
        self._buffer.issue(self._dispatcher.tickets(missing))
        self._prefetch.want(self._dispatcher.outstanding)

    def _give_up_cancelled(self, collected: Collected) -> None:
        """Free the slots of cancelled groups; the next groups take their place."""
        for group, reason in self._buffer.cancelled(TRAIN_STREAM).items():
            if group not in self._dispatcher.outstanding:
                continue
            if reason == EQUAL_REWARDS:
                collected.equal += 1
            else:
                collected.cancelled += 1
                collected.last_reason = reason
                log.warning("group %d is given up: %s", group, reason)
            self._dispatcher.settle([group])

    def _read_complete(self, collected: Collected, version: int) -> None:
        """Read the window's groups that are complete; cancel those of equal reward, issue the unusable again."""
        complete = set(self._buffer.complete(TRAIN_STREAM))
        stale: list[int] = []
        unreadable: list[int] = []
        for group in (group for group in self._dispatcher.window() if group in complete - collected.groups.keys()):
            try:
                trajectories = self._prefetch.read(group)
                self._check_tickets(group, trajectories)
            except KeyError:
                continue  # Redis has lost it since it was asked: it is missing, and issued again, at the next look
            except CodecError as error:
                log.warning("group %d cannot be read and is issued again: %s", group, error)
                unreadable.append(group)
                continue
            age = staleness(version, trajectories)
            if age > self._config.max_staleness:
                log.warning("group %d is dropped and issued again: %d updates old", group, age)
                stale.append(group)
            elif self._config.dynamic_sampling and has_equal_rewards(trajectories):
                # Its slot is freed where those of all cancelled groups are.
                self._buffer.cancel(TRAIN_STREAM, group, EQUAL_REWARDS)
            else:
                collected.groups[group] = trajectories
        self._buffer.remove(TRAIN_STREAM, stale + unreadable)
        # Out, but no longer known to Redis: issue them right away, under the same numbers.
        self._buffer.issue(self._dispatcher.tickets(stale + unreadable))
        collected.stale += len(stale)
        collected.unreadable += len(unreadable)

    def _check_tickets(self, group: int, trajectories: Sequence[Trajectory]) -> None:
        """Raises CodecError unless every trajectory was played for its ticket of this group, and there are some."""
        tickets = self._dispatcher.tickets([group])
        if not trajectories:
            raise CodecError("it has no trajectory")
        for trajectory in trajectories:
            played = trajectory.ticket
            if not 0 <= played.member < len(tickets) or tickets[played.member] != played:
                raise CodecError(f"the trajectory of {played.id} was played for another ticket than this run's")
            if not any(step.versions for step in trajectory.steps):
                raise CodecError(f"the trajectory of {played.id} has no token")
