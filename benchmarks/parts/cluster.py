"""A Ray cluster of this process, for what a benchmark or check starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cluster(*, learners: int = 1, object_store: int | None = None) -> Iterator[None]:
    """Run a cluster on this machine with its cards.

    Args:
        learners: places of learner ranks.
        object_store: bytes of Ray's object store; None: Ray's default.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=2,
        resources={"learner": learners},
        object_store_memory=object_store,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()
