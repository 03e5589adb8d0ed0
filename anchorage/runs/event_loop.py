"""Running a coroutine from code that blocks, wherever that code runs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run the coroutine to its end and return what it returns.

    A notebook's cell runs on an event loop already, and a thread has one loop at most: the coroutine then gets a thread
    of its own while this one waits.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1, thread_name_prefix="event-loop") as pool:
        return pool.submit(asyncio.run, coroutine).result()
