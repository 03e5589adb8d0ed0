"""What the packages' tests share: a real redis-server and Ray a session, a run name a test, no deadlines."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import settings

from services.redis_server import EmbeddedRedis
from services.telemetry import OUR_PACKAGES
from tests import needs, official_data

official_data.hide()
# Ray's workers are nice by default (15): on a busy machine they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")
# Of several ranks that fail, a test asks for one error; Ray would print the others between the dots.
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")

# A busy machine is no failure.
settings.register_profile("anchorage", deadline=None)
settings.load_profile("anchorage")


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a redis-server that the whole session shares."""
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def run_name() -> str:
    """A run that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(autouse=True)
def _logging_restored() -> Iterator[None]:
    """A command that runs in the test's process sets up logging: handlers and levels are not left to the next test."""
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, OUR_PACKAGES)]
    handlers, levels = root.handlers[:], [logger.level for logger in loggers]
    yield
    root.handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of the loopback at which nobody listens, nor can: it is kept."""
    with socket.socket() as kept:
        kept.bind(("127.0.0.1", 0))
        yield kept.getsockname()[1]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster for all tests: two rollout actors and three learner ranks have room."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        resources={"rollout": 2, "learner": 3},
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=200 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from tests.side_by_side import Scheduling

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        from tests.side_by_side import longest_first

        longest_first(items)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not run, why, and what to install."""
    if lines := needs.summary(terminalreporter.stats.get("skipped", [])):
        terminalreporter.section("not run")
        for line in lines:
            terminalreporter.line(line)
