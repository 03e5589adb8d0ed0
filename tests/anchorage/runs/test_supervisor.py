"""A process that died is restarted, whatever the main thread waits for."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from anchorage.runs.supervisor import Supervisor
from services.buffer import Buffer
from services.config.tree import BufferConfig
from services.redis_server import EmbeddedRedis


def test_redis_comes_back_while_the_main_thread_waits_for_it(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    supervisor = Supervisor([server.ensure_running], every_s=0.05)
    supervisor.start()
    buffer = Buffer.connect(server.url, "kept", BufferConfig(reconnect_s=30.0))
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    assert buffer.stats().queued == 0  # returns when Redis answers again
    supervisor.pause()
    pid = server.pid
    assert pid is not None
    buffer.close()
    server.stop()
    supervisor.close()


def test_a_check_that_fails_is_repeated_and_a_pause_is_final() -> None:
    checked, enough = [], threading.Event()

    def check() -> None:
        checked.append(1)
        if len(checked) == 3:
            enough.set()
        raise OSError("cannot check")

    supervisor = Supervisor([check], every_s=0.01)
    supervisor.start()
    assert enough.wait(30)
    supervisor.pause()
    seen = len(checked)
    assert not threading.Event().wait(0.1)
    assert len(checked) == seen
    supervisor.close()


def test_a_supervisor_that_never_started_closes() -> None:
    Supervisor([lambda: None]).close()
