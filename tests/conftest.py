"""What the packages' tests share: a real redis-server and Ray a session, a run name a test, no deadlines."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from hypothesis import settings

from services.redis_server import EmbeddedRedis
from tests import needs

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


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not run, and why."""
    stats = terminalreporter.stats
    lines = needs.summary(stats.get("skipped", []), len(stats.get("deselected", [])))
    if lines:
        terminalreporter.section("not run")
        for line in lines:
            terminalreporter.line(line)
