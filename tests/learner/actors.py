"""A thread in place of the rollout actors: it leases tickets and stores episodes that no model played."""

from __future__ import annotations

import threading

from tests.learner.synthetic import play


class Actors:
    """Plays every ticket with the newest published version, until stopped. Fails groups in `broken` for good."""

    def __init__(self, buffer, channel, version=None, broken=(), play=play):
        self._buffer, self._channel, self._version, self._broken = buffer, channel, version, broken
        self._play = play
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()

    def _run(self):
        while not self._stop.is_set():
            # Last leased first played: groups complete out of order.
            for ticket in reversed(self._buffer.lease("actor", 8, 30.0)):
                if ticket.group in self._broken:
                    self._buffer.fail("actor", ticket.id, "broken game")
                    continue
                newest = self._channel.latest().version
                self._buffer.store(self._play(ticket, newest if self._version is None else self._version(newest)))
            self._stop.wait(0.01)
