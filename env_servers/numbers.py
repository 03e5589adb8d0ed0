"""What a reward and the facts of a step must be: finite numbers, and `won` true or false.

Invariants
- Every client and every server asks here, so no protocol lets through what another refuses.
- Missing is not wrong: `won` may be absent or null.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

MAX_SHOWN_CHARS = 60
LARGEST_INTEGER = 2**63


def fault(reward: object, facts: Mapping[str, object]) -> str | None:
    """The first value that is not what it must be, in words; None where all are.

    Example: `fault(0.0, {"won": "no"})` is `facts.won is "no", not true or false`.
    """
    if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not _fits(reward):
        return f"reward is {_shown(reward)}, not a finite number"
    won = facts.get("won")
    if won is not None and not isinstance(won, bool):
        return f"facts.won is {_shown(won)}, not true or false"
    for name, value in _numbers(facts):
        if not _fits(value):
            return f"{name} is {_shown(value)}, not a finite number of 64 bits"
    return None


def _fits(value: float) -> bool:
    # math.isfinite raises on integers that no float can hold.
    return -LARGEST_INTEGER <= value < LARGEST_INTEGER if isinstance(value, int) else math.isfinite(value)


def _numbers(facts: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """Every number in nested facts with its path. A stack, since foreign JSON may be nested deeply."""
    left: list[tuple[str, object]] = [("facts", facts)]
    while left:
        path, value = left.pop()
        if isinstance(value, (int, float)):
            yield path, value
        elif isinstance(value, Mapping):
            left += [(f"{path}.{name}", inner) for name, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            left += [(f"{path}.{number}", inner) for number, inner in enumerate(value)]


def _shown(value: object) -> str:
    if isinstance(value, int) and not -LARGEST_INTEGER <= value < LARGEST_INTEGER:
        return "an integer beyond 64 bits"  # whose digits Python may refuse to write
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"
