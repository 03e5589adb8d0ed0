"""Tickets of dead actors go back to the queue without any actor's help, and Redis may be away meanwhile."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

import pytest

from anchorage.runs.leases import QUICK, LeaseKeeper
from anchorage.runs.supervisor import Supervisor
from services.buffer import Buffer
from services.buffer.owner import take
from services.config.tree import BufferConfig, Config
from services.redis_server import EmbeddedRedis
from services.schemas import Task, Ticket
from tests.services.buffer.lost_data import take_over
from tests.waiting import until

TASK = Task(env="e", split="s", index=0)
CONFIG = Config.model_validate({"run": {"name": "kept"}, "rollout": {"max_attempts": 2}})


def test_leases_of_the_dead_end_while_the_learner_is_busy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody but the supervisor's thread reads the run's clock, and Redis dies in between."""
    caplog.set_level(logging.WARNING)
    server = EmbeddedRedis(tmp_path)
    server.start()
    buffer = Buffer.connect(server.url, "kept", BufferConfig(reconnect_s=30.0), max_attempts=2)
    owner = take(buffer, "kept", "lineage", 600.0)
    buffer.own(owner)
    buffer.issue([Ticket(group=0, member=member, group_size=2, task=TASK, seed=0) for member in range(2)])
    keeper = LeaseKeeper(CONFIG, server.url, owner)
    supervisor = Supervisor([server.ensure_running, keeper.check], every_s=0.05)
    supervisor.start()
    for attempt in range(2):
        buffer.lease("dead", 2, 0.2)
        if attempt == 0:
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            until(lambda: buffer.stats().leased == 0)
            assert buffer.stats().queued == 2
    until(lambda: buffer.cancelled("train"))
    assert buffer.cancelled("train")[0].endswith("failed 2 times, last: lease of dead expired")
    assert "leases of rollout actors expired" in caplog.text
    assert "supervision failed" not in caplog.text
    supervisor.pause()
    keeper.close()
    buffer.close()
    server.stop()
    supervisor.close()


def test_a_check_neither_fails_nor_hangs_without_redis_or_the_name(closed_port: int, redis_url: str) -> None:
    buffer = Buffer.connect(redis_url, "kept", BufferConfig())
    owner = take(buffer, "kept", "lineage", 600.0)
    keepers = [LeaseKeeper(CONFIG, f"redis://127.0.0.1:{closed_port}/0", owner), LeaseKeeper(CONFIG, redis_url, owner)]
    take_over(buffer)
    began = time.monotonic()
    for keeper in keepers:
        keeper.check()
        keeper.close()
    assert time.monotonic() - began < 10 * (QUICK.timeout_s + QUICK.reconnect_s)
    buffer.close()
