"""Restarts a run's own processes when they die, however busy the run's thread is.

That thread may wait a minute for a Redis that only this process restarts, or be in an update for longer.

Invariants
- The kernel ends a process together with the thread that started it, so the supervisor's thread lives until `close`.
- `pause` comes before anybody stops a supervised process: otherwise it would be restarted.
- A check that fails is logged and repeated.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

CHECK_EVERY_S = 1.0

log = logging.getLogger(__name__)


class Supervisor:
    """Calls each of `checks` every `every_s` seconds, on a thread of its own, from `start` until `pause`.

    A check restarts what has died, and may raise.
    """

    def __init__(self, checks: Sequence[Callable[[], object]], every_s: float = CHECK_EVERY_S) -> None:
        self._checks = checks
        self._every_s = every_s
        self._checking = threading.Lock()
        self._paused = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Start the thread and the checks."""
        self._thread.start()

    def pause(self) -> None:
        """Stop checking for good; return when a check in progress has ended. The thread stays."""
        self._paused.set()
        with self._checking:
            pass

    def close(self) -> None:
        """End the thread, and with it any process that it started and that is still running. No-op before `start`."""
        self.pause()
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._paused.wait(self._every_s):
            with self._checking:
                if not self._paused.is_set():
                    self._check()
        self._closed.wait()

    def _check(self) -> None:
        for check in self._checks:
            try:
                check()
            except Exception as error:
                log.warning("supervision failed; retrying in %g s: %s", self._every_s, error)
