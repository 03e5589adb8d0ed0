"""The index of a run's archived groups (see `services.archive`), for lists, filters and single groups.

Invariants
- A file's index is read once for each version of the file; at most `MAX_CACHED` are held.
- A damaged or deleted file is left out of lists and logged.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from services.archive import ArchiveDamaged, EpisodeSummary, GroupEntry, Ids, MemberEntry, files, numbers_of, read_index
from services.control.views import GroupSummary, TrajectorySummary

MAX_CACHED = 2048

log = logging.getLogger(__name__)

Rows = list[tuple[GroupSummary, list[TrajectorySummary]]]


class GroupIndex:
    """The groups of one run that the archive still has. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[Path, int, int], Rows] = OrderedDict()

    def updates(self) -> list[int]:
        """Updates whose groups are in the archive, ascending."""
        return [int(path.stem) for path in files(self._folder)]

    def rows(self) -> Iterator[tuple[GroupSummary, list[TrajectorySummary]]]:
        """Every group with its episodes, newest update first."""
        for path in reversed(files(self._folder)):
            yield from self._summaries(path)

    def find(self, group: int) -> tuple[Path, GroupSummary, GroupEntry] | None:
        """The file of a group and its entry there; None if there is none. A group is trained on only once.

        Raises:
            ArchiveDamaged: the file is damaged.
            OSError, StopIteration: the file was removed or replaced meanwhile.
        """
        for path in reversed(files(self._folder)):
            for summary, _ in self._summaries(path):
                if summary.group == group:
                    entries = read_index(path).groups
                    return path, summary, next(entry for entry in entries if entry.group == group)
        return None

    def step_group_sizes(self, last: int) -> Iterator[tuple[int, dict[int, int]]]:
        """Number of step groups by size in turns, for each of the newest `last` updates.

        Example: (12, {1: 40, 3: 5}) means that update 12 had 40 lone turns and 5 states that three turns were taken in.
        """
        for path in files(self._folder)[-last:]:
            try:
                index = read_index(path)
                ids = np.concatenate([_turn_states(m) for entry in index.groups for m in entry.members])
            except (ArchiveDamaged, OSError, ValueError) as error:
                log.warning("unreadable group archive skipped: %s", error)
                continue
            sizes, counts = np.unique(np.unique(ids, return_counts=True)[1], return_counts=True)
            yield index.update, dict(zip(sizes.tolist(), counts.tolist(), strict=True))

    def _summaries(self, path: Path) -> Rows:
        try:
            stat = path.stat()
            key = (path, stat.st_ino, stat.st_mtime_ns)
            with self._lock:
                if key in self._cache:
                    return self._cache[key]
            index = read_index(path)
            rows = [_summarise(index.update, entry) for entry in index.groups]
        except (ArchiveDamaged, OSError, ValueError) as error:
            log.warning("unreadable group archive skipped: %s", error)
            return []
        with self._lock:
            self._cache[key] = rows
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return rows


def _summarise(update: int, entry: GroupEntry) -> tuple[GroupSummary, list[TrajectorySummary]]:
    _, sizes = np.unique(np.concatenate(list(map(_turn_states, entry.members))), return_counts=True)
    oldest = min(member.oldest_version for member in entry.members)
    summary = GroupSummary(
        group=entry.group,
        update=update,
        task=entry.task,
        task_type=entry.task_type,
        episodes=len(entry.members),
        won=sum(member.won for member in entry.members),
        mean_reward=sum(member.reward for member in entry.members) / len(entry.members),
        steps=sum(member.steps for member in entry.members),
        turns=sum(len(_turn_states(member)) for member in entry.members),
        step_groups=len(sizes),
        largest_step_group=int(sizes.max(initial=0)),
        staleness=max(0, update - 1 - oldest),
        oldest_version=oldest,
        newest_version=max(member.newest_version for member in entry.members),
    )
    return summary, [episode_summary(summary, member) for member in entry.members]


def episode_summary(group: GroupSummary, member: MemberEntry) -> TrajectorySummary:
    """One episode of a group for lists."""
    numbers = numbers_of(member)
    first = numbers.first_calls
    return TrajectorySummary(
        **member.model_dump(include=set(EpisodeSummary.model_fields)),
        group=group.group,
        update=group.update,
        task=group.task,
        task_type=group.task_type,
        turns=len(first),
        episode_advantage=float(numbers.episode[first[0]]) if len(first) else 0.0,
    )


def _turn_states(member: MemberEntry) -> Ids:
    """int64 [turns], step group of each turn of an episode."""
    numbers = numbers_of(member)
    return numbers.step_group[numbers.first_calls]
