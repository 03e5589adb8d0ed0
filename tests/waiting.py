"""Waiting in tests: on a condition, with a limit, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = 300.0) -> T:
    """What the condition gives as soon as it is true.

    Raises:
        AssertionError: it was not within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds:.0f} s"
        time.sleep(0.01)
    return value
