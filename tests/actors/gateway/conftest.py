"""A gateway for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.actors.gateway.scene import Scene, agent_config, gateway


@pytest_asyncio.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with gateway(agent_config(tmp_path)) as made:
        yield made
