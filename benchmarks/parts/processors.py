"""Number of processors that two busy processes get: 2.0 on two cores, less on two hyper-threads of one core.

It limits everything that runs concurrently: an update and the rollouts, an actor and its environment.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier

SIZE, PRODUCTS = 128, 100_000
LIMIT_S = 120.0


def measure() -> float:
    """Return how many matrix products two processes finish in the time that one process alone takes for one."""
    (alone,), together = _seconds(1), _seconds(2)
    return 2 * alone / max(together)


def _seconds(count: int) -> list[float]:
    context = multiprocessing.get_context("spawn")
    start = (context.Barrier(count),)
    with ProcessPoolExecutor(count, mp_context=context, initializer=_begin_together, initargs=start) as workers:
        return list(workers.map(_multiply, [PRODUCTS] * count, timeout=LIMIT_S))


def _begin_together(start: Barrier) -> None:
    import torch

    torch.set_num_threads(1)
    start.wait(LIMIT_S)


def _multiply(products: int) -> float:
    import torch

    # As small as the matrices of a small policy, so that both Python and the multiplications take time.
    left = right = torch.ones(SIZE, SIZE)
    began = time.perf_counter()
    for _ in range(products):
        torch.mm(left, right)
    return time.perf_counter() - began
