"""Collect the groups of an update: issue tickets, read complete groups, replace those that cannot be used.

Invariants
- Staleness is checked when a group is about to be used. A group that is too old is counted, removed and issued again
  under its number. So is one that cannot be read (damaged, incomplete, written by another release), or whose episodes
  are not those of the tickets that the dispatcher computes.
- Dynamic sampling drops a group when it is read: it is cancelled in Redis, and the next new group takes its slot.
- Groups are issued after the learner's version is announced, so that they are played with it or a newer one. Complete
  groups are used before, as far as they are fresh enough.
- Every wait ends: a run in which no group, or no usable group, completes stops with one clear line.
- A poll costs as much as there is news, since it comes with every completed group: what is new since the poll before is
  asked for, and all groups are read again only every `REREAD_S`, in case Redis has lost some of them.

Example: groups_per_update=2; 0 and 1 are the window, 2 and 3 are outstanding too. Each line is one `poll`.

    Redis                          collected  action
    0 complete                     0          1 is still being played: wait
    0, 1 complete, 1 is too old    0          remove 1, issue its tickets again
    1 cancelled: tickets failed    0          settle 1, issue group 4 in its slot; the window is now 0 2
    2 complete                     0 2        the window is whole: train
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

from learner.dispatch import Dispatcher
from learner.dynamic_sampling import EQUAL_REWARDS, Collected, has_equal_rewards
from learner.prefetch import Prefetcher
from learner.report import staleness
from services.buffer import FROM_THE_START, Buffer, Closed
from services.codec import CodecError
from services.config.tree import LearnerConfig
from services.errors import RunStalled
from services.schemas import TRAIN_STREAM, Trajectory

POLL_S = 0.5
REREAD_S = 2.0
FULL = "the buffer is full: raise buffer.max_mib, or lower learner.groups_per_update or learner.group_size"

log = logging.getLogger(__name__)


class Intake:
    """Collects groups for updates.

    Args:
        config: of the learner.
        buffer: the run's.
        dispatcher: decides which groups are issued.
        prefetch: reads complete groups.
        announced: whether the actors can get the learner's version; new groups are issued only then.
        reread_s: how often to read all groups, in seconds.
        waiting: called before each wait for the actors.

    Attributes:
        issued: whether the groups of the present version have been issued.
    """

    def __init__(
        self,
        config: LearnerConfig,
        buffer: Buffer,
        dispatcher: Dispatcher,
        prefetch: Prefetcher,
        announced: Callable[[], bool] = lambda: True,
        reread_s: float = REREAD_S,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._buffer = buffer
        self._dispatcher = dispatcher
        self._prefetch = prefetch
        self._announced = announced
        self._reread_s = reread_s
        self._reread_at = -math.inf
        self._complete: set[int] = set()
        self._upto = FROM_THE_START
        self._may_miss = True
        self._waiting = waiting
        self.issued = False

    def collect(self, version: int, interrupted: Callable[[], bool]) -> Collected | None:
        """Wait for the groups of the update of policy `version`.

        Args:
            version: the learner's policy version.
            interrupted: asked repeatedly while waiting; True ends the wait.

        Returns:
            The groups in ascending order; None if interrupted.

        Raises:
            RunStalled: no group, or no usable group, completes.
        """
        collected = Collected()
        quiet_since = time.monotonic()
        while not interrupted():
            if self.poll(version, collected):
                return collected
            collected.check_waste(self._config, self._dispatcher.capacity)
            if not self.issued:
                continue  # the version is announced in a moment
            self._waiting()
            if self._buffer.wait(TRAIN_STREAM, POLL_S):
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > self._config.group_timeout_s:
                raise RunStalled(
                    f"no group completed for {self._config.group_timeout_s:g} s (learner.group_timeout_s); "
                    + (FULL if self._buffer.full() else "are the rollout actors and the environment server up?")
                )
        return None

    def poll(self, version: int, collected: Collected) -> bool:
        """Read complete groups and issue missing ones, once. Returns whether `collected` holds the whole window."""
        # The run's supervisor expires leases too, also during an update. Each call keeps the run's clock going.
        self._buffer.expire()
        self._settle_cancelled(self._news(), collected)
        if self._announced():
            self.issue(version)
        self._read_complete(collected, version)
        window = self._dispatcher.window()
        if len(window) < self._config.groups_per_update:
            return False  # the next groups are not issued yet
        if len(collected.groups) < len(window) or not collected.groups.keys() >= set(window):
            return False
        collected.groups = {group: collected.groups[group] for group in window}
        return True

    def issue(self, version: int) -> None:
        """Issue new groups, and again those that Redis does not have: issuing is idempotent."""
        groups = self._dispatcher.advance(self._config.updates - version)
        if self._may_miss or not self.issued:
            groups = self._dispatcher.missing(self._buffer.known(TRAIN_STREAM))
            self._may_miss = False
        elif not groups:
            return
        self.issued = True
        self._buffer.issue(self._dispatcher.tickets(groups))
        self._prefetch.want(self._dispatcher.outstanding)

    def read_again(self) -> None:
        """Make the next poll read all groups."""
        self._reread_at = -math.inf

    def _news(self) -> Closed:
        """The groups closed since the last call; all of them now and then. Notes which are complete."""
        now = time.monotonic()
        if now >= self._reread_at:
            self._reread_at, self._may_miss = now + self._reread_s, True
            self._upto = FROM_THE_START
            self._complete.clear()
        news = self._buffer.closed(TRAIN_STREAM, self._upto)
        self._upto = news.upto
        self._complete.update(news.complete)
        return news

    def _settle_cancelled(self, news: Closed, collected: Collected) -> None:
        """Free the slots of cancelled groups, so that the next groups take their place."""
        outstanding = self._dispatcher.outstanding if news.cancelled else frozenset()
        for group, reason in sorted(news.cancelled.items()):
            if group not in outstanding:
                continue
            if reason == EQUAL_REWARDS:
                collected.equal += 1
            else:
                collected.cancelled += 1
                collected.last_reason = reason
                log.warning("group %d cancelled: %s", group, reason)
            self._dispatcher.settle([group])

    def _read_complete(self, collected: Collected, version: int) -> None:
        """Read the complete groups of the window; cancel those of equal reward, issue unusable ones again."""
        limit = self._config.max_staleness
        stale: list[int] = []
        unreadable: list[int] = []
        for group in sorted(self._complete.intersection(self._dispatcher.window()) - collected.groups.keys()):
            try:
                trajectories = self._prefetch.read(group)
                self._check_tickets(group, trajectories)
            except KeyError:
                self._complete.discard(group)
                continue  # Redis has lost it: the next reading of all groups finds it missing, and it is issued again
            except CodecError as error:
                log.warning("group %d unreadable, issuing it again: %s", group, error)
                unreadable.append(group)
                continue
            age = staleness(version, trajectories)
            if age > limit:
                log.warning("group %d is %d updates old (max. %d), issuing it again", group, age, limit)
                stale.append(group)
            elif self._config.dynamic_sampling and has_equal_rewards(trajectories):
                # `_settle_cancelled` frees its slot in the next poll, as after a resumption, which finds only the mark.
                self._complete.discard(group)
                self._buffer.cancel(TRAIN_STREAM, group, EQUAL_REWARDS)
            else:
                collected.groups[group] = trajectories
        self._complete.difference_update(stale, unreadable)
        self._buffer.remove(TRAIN_STREAM, stale + unreadable)
        # Issue them right away: as long as they are missing, later groups would be played before them.
        self._buffer.issue(self._dispatcher.tickets(stale + unreadable))
        collected.stale += len(stale)
        collected.unreadable += len(unreadable)

    def _check_tickets(self, group: int, trajectories: Sequence[Trajectory]) -> None:
        """Raise CodecError unless there are trajectories, each of them played for its ticket of this group."""
        tickets = self._dispatcher.tickets([group])
        if not trajectories:
            raise CodecError("no trajectory")
        for trajectory in trajectories:
            played = trajectory.ticket
            if not 0 <= played.member < len(tickets) or tickets[played.member] != played:
                raise CodecError(f"the trajectory of {played.id} was not played for this run's ticket")
            if not any(step.versions for step in trajectory.steps if step.trained):
                raise CodecError(f"the trajectory of {played.id} has no tokens to train on")
