"""Two tiers: `make test` has TEST_TIER=short; `make test-all`, and pytest by itself, run everything.

What belongs to the longer tier alone is `@long`. A search takes fewer examples in the short one: `examples`.
"""

from __future__ import annotations

import os

import pytest

SHORT = os.environ.get("TEST_TIER") == "short"

long = pytest.mark.skipif(SHORT, reason="part of the longer tier: make test-all")


def examples(all_of_them: int, *, short: int) -> int:
    """How many examples hypothesis tries."""
    return short if SHORT else all_of_them
