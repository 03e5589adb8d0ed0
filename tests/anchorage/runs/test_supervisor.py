"""What died is started again, whatever the main thread waits for."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from anchorage.runs.supervisor import Keeper
from services.buffer import Buffer
from services.config.tree import BufferConfig
from services.redis_server import EmbeddedRedis


def test_redis_comes_back_while_the_main_thread_waits_for_it(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    keeper = Keeper([server.ensure_running], every_s=0.05)
    keeper.start()
    buffer = Buffer.connect(server.url, "kept", BufferConfig(reconnect_s=30.0))
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    assert buffer.stats().queued == 0  # returns when Redis answers again
    keeper.rest()
    pid = server.pid
    assert pid is not None
    buffer.close()
    server.stop()
    keeper.end()


def test_a_look_that_fails_is_repeated_and_rest_is_final() -> None:
    looked, enough = [], threading.Event()

    def look() -> None:
        looked.append(1)
        if len(looked) == 3:
            enough.set()
        raise OSError("cannot look")

    keeper = Keeper([look], every_s=0.01)
    keeper.start()
    assert enough.wait(30)
    keeper.rest()
    seen = len(looked)
    assert not threading.Event().wait(0.1)
    assert len(looked) == seen
    keeper.end()


def test_a_keeper_that_never_started_ends() -> None:
    Keeper([lambda: None]).end()
