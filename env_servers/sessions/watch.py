"""Reports calls of an environment that block the event loop: a hang there stops the whole process, without a word.

An environment that is not `blocking` is called on the loop itself, where no call can be ended. So a thread looks at how
long the present call has been running.

Invariants
- A call costs two assignments. Each is reported at most once while it runs, and once more when it returns.
"""

from __future__ import annotations

import logging
import threading
import time

logger = logging.getLogger(__name__)

BLOCKS_S = 5.0
"""A call on the loop that takes longer is reported. It should take a millisecond."""


class LoopCall:
    """The present call of an environment on the event loop. One thread begins and ends calls, another one looks.

    Args:
        environment: its name.
    """

    def __init__(self, environment: str) -> None:
        self._environment = environment
        self._running: tuple[str, float] | None = None
        self._reported: tuple[str, float] | None = None

    def begin(self, doing: str) -> None:
        """Note that a call begins; `doing` is its name, as in `step 3`."""
        self._running = (doing, time.monotonic())

    def end(self) -> None:
        """Note that it has returned."""
        running, self._running = self._running, None
        if running is not None and running is self._reported:
            logger.error(
                "environment %s no longer blocks the event loop: %s took %.1f s",
                self._environment,
                running[0],
                time.monotonic() - running[1],
            )

    def report(self, blocks_s: float) -> bool:
        """Log a call that has been running for longer than `blocks_s`, once; whether it was logged now."""
        running = self._running
        if running is None or running is self._reported or time.monotonic() - running[1] < blocks_s:
            return False
        self._reported = running
        logger.error(
            "environment %s blocks the event loop: %s has not returned for %.1f s, and no other request is served "
            "meanwhile; set blocking = True in its class, which runs calls in threads with a time limit",
            self._environment,
            running[0],
            time.monotonic() - running[1],
        )
        return True


class LoopWatch:
    """A thread that reports blocking calls while it is entered."""

    def __init__(self, call: LoopCall, blocks_s: float = BLOCKS_S) -> None:
        self._call = call
        self._blocks_s = blocks_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loop-watch", daemon=True)

    def __enter__(self) -> LoopWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._blocks_s / 5):
            self._call.report(self._blocks_s)
