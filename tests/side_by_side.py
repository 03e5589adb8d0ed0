"""How the suite is dealt to pytest-xdist's workers (`pytest -n 2`): what stays together, and what begins first.

A file's tests run on one worker, in their order, since they share fixtures. Of that there are exceptions:

- files whose tests share a Ray cluster run on one worker, which starts the only one;
- in a file of `APART` each test starts what it needs, so that its tests may run on several workers.

What takes long begins first; otherwise a worker would be left alone with it at the end.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

ON_RAY = (
    "tests/learner/rank/test_group.py",
    "tests/actors/test_pool.py",
    "tests/learner/test_trainer.py",
    "tests/integration/test_on_policy.py",
    "tests/services/weights/test_ray_store.py",
    "tests/learner/rank/test_outbox.py",
)
APART = (
    "tests/integration/test_run.py",
    "tests/actors/engine/test_process.py",
    "tests/anchorage/cli/test_mistakes.py",
    "tests/anchorage/cli/test_evaluate.py",
    "tests/anchorage/runs/test_warmstart.py",
    "tests/env_servers/test_scale.py",
)
FIRST = (
    *ON_RAY,
    "tests/integration/test_run.py",
    "tests/actors/",
    "tests/browser/",
    "tests/anchorage/",
    "tests/services/buffer/",
    "tests/env_servers/",
)
"""Beginnings of paths, what takes longest first."""


def scope_of(nodeid: str) -> str:
    """What runs on one worker as a whole has the same scope."""
    file = nodeid.partition("::")[0]
    if file in ON_RAY:
        return "ray"
    return nodeid if file in APART else file


def longest_first(items: list[pytest.Item]) -> None:
    """Put the tests into the order in which they are dealt."""
    items.sort(key=lambda item: _place(item.nodeid))


def _place(nodeid: str) -> int:
    return next((place for place, beginning in enumerate(FIRST) if nodeid.startswith(beginning)), len(FIRST))


class Scheduling(LoadScopeScheduling):
    """Deals whole scopes, in the order of the collection."""

    def __init__(self, config: pytest.Config, log: object) -> None:
        super().__init__(config, log)  # type: ignore[arg-type]
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)
