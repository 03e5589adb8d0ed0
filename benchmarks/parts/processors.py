"""How many processors two busy processes have here: 2.0 on two cores, less on two hyper-threads of one.

Whatever runs beside something else is bounded by it: an update beside the rollouts, an actor beside its environment.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier

SIZE, PRODUCTS = 128, 100_000
LIMIT_S = 120.0


def measure() -> float:
    """Products of matrices that two processes finish in the time in which one alone finishes one."""
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

    # As small as what a small policy computes: neither Python nor the multiplications alone are what it spends.
    left = right = torch.ones(SIZE, SIZE)
    began = time.perf_counter()
    for _ in range(products):
        torch.mm(left, right)
    return time.perf_counter() - began
