"""Starts again what died of a run's own processes, however busy the main thread is.

The main thread may wait a minute for a Redis that nobody but itself would start, or compute an update for longer.

Invariants
- The kernel ends such a process with the thread that started it: the keeper's thread lives until `end`. `rest` comes
  before anybody stops what it keeps.
- A look that fails is logged and repeated.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

LOOK_EVERY_S = 1.0

log = logging.getLogger(__name__)


class Keeper:
    """Calls every one of `looks` again and again, on a thread of its own, from `start` until `rest`."""

    def __init__(self, looks: Sequence[Callable[[], object]], every_s: float = LOOK_EVERY_S) -> None:
        self._looks = looks
        self._every_s = every_s
        self._looking = threading.Lock()
        self._resting = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def rest(self) -> None:
        """Look no more; returns when a look in progress has ended."""
        self._resting.set()
        with self._looking:
            pass

    def end(self) -> None:
        """End the thread, and with it whatever it started and nobody has stopped. No-op before `start`."""
        self.rest()
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._resting.wait(self._every_s):
            with self._looking:
                if not self._resting.is_set():
                    self._look()
        self._over.wait()

    def _look(self) -> None:
        for look in self._looks:
            try:
                look()
            except Exception as error:
                log.warning("%s", error)
