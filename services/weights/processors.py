"""All processors for the moments in which a process of the run does nothing but copy weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

MOST = 8
"""More do not copy faster: memory is the limit."""


@contextmanager
def all_processors() -> Iterator[None]:
    """Let torch use every processor of this process, up to `MOST`, until the block ends."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(before, min(MOST, len(os.sched_getaffinity(0)))))
    try:
        yield
    finally:
        torch.set_num_threads(before)
