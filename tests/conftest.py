"""Fixtures that several packages share: one real redis-server a session, one run name a test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from services.redis_server import EmbeddedRedis


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a redis-server that the whole session shares."""
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def run_name() -> str:
    """A run that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"
