"""Several real servers as one: the load is spread, and the death of one costs its episodes a restart."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.episode import play
from actors.prompts import PromptBuilder, load_tokenizer
from actors.replicas import Replicas
from env_servers.client import EnvironmentUnavailableError, HttpClient, SessionLost
from env_servers.clients.local import LocalClient
from env_servers.launch import ServerProcess
from env_servers.protocol import ResetRequest
from services.config.tree import Config
from services.schemas import Task, Ticket
from tests.actors.scripted_engine import ScriptedEngine
from tests.env_servers.counting import Counting
from tests.env_servers.launching import COUNTING, launch

RESET = ResetRequest(split="train", index=0)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[ServerProcess]]:
    started = []
    for number in range(2):
        started.append(launch(tmp_path / f"server-{number}"))
    yield started
    for server in started:
        server.stop()


def replicas(servers: list[ServerProcess]) -> Replicas:
    return Replicas([HttpClient(server.url, timeout_s=5.0, patience_s=0.2) for server in servers])


def kill(server: ServerProcess) -> None:
    os.kill(server.pid, signal.SIGKILL)
    server.stop()


def held(client: Replicas) -> list[int]:
    return [replica.sessions for replica in client._replicas]


async def test_the_load_is_spread_and_the_dead_are_left_out(servers: list[ServerProcess]) -> None:
    client = replicas(servers)
    sessions = [(await client.reset(RESET)).session for _ in range(6)]
    assert held(client) == [3, 3]
    kill(servers[0])
    lost = 0
    for session in sessions:
        try:
            await client.step(session, 1, "up")
        except SessionLost:
            lost += 1
    assert lost == 3
    again = [(await client.reset(RESET)).session for _ in range(lost)]
    assert held(client) == [3, 6]
    for session in [*sessions, *again]:
        await client.close_session(session)
    assert held(client) == [0, 0]
    kill(servers[1])
    with pytest.raises(EnvironmentUnavailableError):
        await client.reset(RESET)
    await client.close()


async def test_a_server_that_comes_back_gets_sessions_again(servers: list[ServerProcess], tmp_path: Path) -> None:
    client = replicas(servers[:1])
    kill(servers[0])
    with pytest.raises(EnvironmentUnavailableError):
        await client.reset(RESET)
    port = servers[0].url.rpartition(":")[2]
    servers.append(launch(tmp_path / "again", COUNTING, "--port", port))
    assert not (await client.reset(RESET)).done
    await client.close()


async def test_episodes_outlive_the_server_they_began_on(servers: list[ServerProcess], config: Config) -> None:
    client = replicas(servers)
    engine = ScriptedEngine(config.model.path)
    engine.answering.clear()
    prompts = PromptBuilder(config.prompt, load_tokenizer(config.model.path), 200)
    task = Task(env="counting", split="train", index=3)
    tickets = [Ticket(group=0, member=m, group_size=4, task=task, seed=m) for m in range(4)]
    playing = [asyncio.create_task(play(ticket, client, engine, prompts, config)) for ticket in tickets]
    async with asyncio.timeout(30):
        while len(engine.seeds) < 4:  # noqa: ASYNC110 - the engine says nothing of itself
            await asyncio.sleep(0.01)
    kill(servers[0])
    engine.answering.set()
    trajectories = await asyncio.gather(*playing)
    assert [trajectory.ticket for trajectory in trajectories] == tickets
    assert all(trajectory.steps[-1].terminated or trajectory.steps[-1].truncated for trajectory in trajectories)
    assert held(client) == [0, 0]
    await client.close()


async def test_any_server_that_is_up_says_what_is_served(servers: list[ServerProcess]) -> None:
    client = replicas(servers)
    kill(servers[0])
    for _ in range(2):
        assert (await client.info()).name == "counting"
    kill(servers[1])
    with pytest.raises(EnvironmentUnavailableError):
        await client.info()
    await client.close()


async def test_actors_with_fewer_episodes_than_servers_use_all_of_them() -> None:
    """Each knows its own sessions only: if all took the first of several idle servers, the last were never used."""
    servers = [LocalClient(Counting) for _ in range(8)]
    for _ in range(40):
        actor = Replicas(servers)
        for _ in range(4):
            await actor.reset(RESET)
        assert sorted(held(actor)) == [0] * 4 + [1] * 4
    sessions = [server._table.live for server in servers]
    assert sum(sessions) == 160
    assert min(sessions) > 0, "a server stays idle by chance with a probability below 1e-11"
