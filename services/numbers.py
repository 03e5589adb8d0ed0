"""Find values that are not finite numbers in plain data.

Invariants
- Nothing that is stored, trained on or reported holds NaN or infinity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def not_finite(value: object, path: str) -> str | None:
    """Path and value of the first float in nested plain data that is NaN or infinite; None if there is none.

    Example: `not_finite({"scores": [1.0, nan]}, "facts")` is `facts.scores.1 is nan`.
    """
    left: list[tuple[str, object]] = [(path, value)]
    while left:
        where, inner = left.pop()
        if isinstance(inner, float) and not math.isfinite(inner):
            return f"{where} is {inner}"
        if isinstance(inner, Mapping):
            left += [(f"{where}.{name}", each) for name, each in inner.items()]
        elif isinstance(inner, (list, tuple)):
            left += [(f"{where}.{number}", each) for number, each in enumerate(inner)]
    return None
