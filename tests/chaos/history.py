"""What the ledger of a run says about it. The learner writes the ledger to disk without going through the buffer."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

GIVEN_UP = re.compile(r"group (\d+) cancelled:")


@dataclass(frozen=True, slots=True)
class Entry:
    """Update number (from 1), group, and the policy versions of each member's tokens."""

    update: int
    group: int
    versions: list[list[int]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Figures of a history.

    Attributes:
        groups_trained: in it. lost: groups that were passed over without having been given up. twice: trained on more
            than once. too_stale: groups with a token older than allowed. torn: updates without their number of groups.
    """

    groups_trained: int
    lost: int
    twice: int
    too_stale: int
    torn: int


def read_ledger(path: Path) -> list[Entry]:
    """All whole lines."""
    if not path.exists():
        return []
    return [Entry(**json.loads(line)) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def given_up(logs: Iterable[str]) -> set[int]:
    """Groups that the learner says it gave up, since their tickets failed too often."""
    return {int(number) for text in logs for number in GIVEN_UP.findall(text)}


def judge(entries: Sequence[Entry], abandoned: set[int], *, per_update: int, max_staleness: int) -> Verdict:
    """Check a finished history: groups go out in order, so below the highest one trained on none may be missing."""
    groups = Counter(entry.group for entry in entries)
    updates = Counter(entry.update for entry in entries)
    highest = max(groups, default=-1)
    lost = set(range(highest + 1)) - groups.keys() - abandoned
    stale = [
        entry
        for entry in entries
        if entry.update - 1 - min(version for member in entry.versions for version in member) > max_staleness
    ]
    expected = range(1, max(updates, default=0) + 1)
    return Verdict(
        groups_trained=len(entries),
        lost=len(lost),
        twice=sum(count > 1 for count in groups.values()),
        too_stale=len(stale),
        torn=sum(updates[update] != per_update for update in expected),
    )
