"""The supervisor in a real Ray: killed actors are replaced and their tickets played; the engine is scripted."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayTaskError

from actors import pool as pool_module
from actors.engine.interface import EngineFailed
from actors.pool import FAILING_CRASHES, Member, Pool, engine_gpus, start_pool
from actors.rollout_process import RolloutSpec
from env_servers.launch import ServerProcess
from services.buffer import Buffer
from services.config.tree import Config
from services.errors import RunStalled
from services.plugins import PluginError
from services.schemas import TRAIN_STREAM, Task, Ticket
from services.weights import open_channel
from tests.actors.scripted_engine import scripted
from tests.env_servers.launching import launch
from tests.waiting import until

GROUPS = 4
SIZE = 4


pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with launch(tmp_path_factory.mktemp("server") / "url") as process:
        yield process


def stop(pool: Any) -> None:
    ray.get(pool.stop.remote(), timeout=30)
    ray.kill(pool)


def test_a_killed_actor_is_replaced_and_its_tickets_are_played(
    config: Config, redis_url: str, server: ServerProcess
) -> None:
    leases = {"rollout": config.rollout.model_dump() | {"lease_s": 3.0}}
    config = Config.model_validate(config.model_dump() | leases)
    buffer = Buffer.connect(redis_url, config.run.name, config.buffer, max_attempts=3)
    open_channel(config.weights, config.run.name, config.run.folder).publish(0, {"weight": torch.zeros(4)})
    pool, running = start_pool(config, redis_url=redis_url, env_urls={"counting": (server.url,)}, engine=scripted)
    try:
        first = until(lambda: len(found := buffer.actors()) == 2 and found)
        task = Task(env="counting", split="train", index=3)
        buffer.issue(
            [
                Ticket(group=g, member=m, group_size=SIZE, task=task, seed=10 * g + m)
                for g in range(GROUPS)
                for m in range(SIZE)
            ]
        )
        # Asked of the buffer: an actor's heartbeat may miss episodes as short as these.
        name = until(lambda: next((t.holder for g in buffer.contents() for t in g.tickets if t.holder), None))
        os.kill(int(str(first[name]["pid"])), signal.SIGKILL)
        until(buffer.expire)  # the run's supervisor does it
        until(lambda: buffer.complete(TRAIN_STREAM) == list(range(GROUPS)))
        until(lambda: len(buffer.actors().keys() - {name}) == 2)
        status = ray.get(pool.status.remote(), timeout=10)
        assert status["wanted"] == len(status["actors"]) == 2
        assert status["deaths"] == status["deaths_in_a_row"] == 1
        assert name not in status["actors"]
        assert status["last_error"]
        assert [len(buffer.read(TRAIN_STREAM, g)) for g in range(GROUPS)] == [SIZE] * GROUPS
    finally:
        stop(pool)
    assert ray.get(running, timeout=10) is None
    assert buffer.stats().leased == 0


def test_wishes_grow_and_shrink_the_pool_while_it_plays(config: Config, redis_url: str, server: ServerProcess) -> None:
    buffer = Buffer.connect(redis_url, config.run.name, config.buffer, max_attempts=3)
    channel = open_channel(config.weights, config.run.name, config.run.folder)
    channel.publish(0, {"weight": torch.zeros(4)})
    buffer.set_desired_actors(1)
    pool, _ = start_pool(config, redis_url=redis_url, env_urls={"counting": (server.url,)}, engine=scripted)
    try:
        [first] = until(lambda: [n for n, facts in buffer.actors().items() if facts["state"] == "playing"])
        channel.publish(7, {"weight": torch.ones(4)})
        buffer.set_desired_actors(9)  # there are two places
        [second] = until(
            lambda: [n for n, facts in buffer.actors().items() if n != first and facts["state"] == "playing"]
        )
        assert buffer.actors()[second]["version"] == 7
        task = Task(env="counting", split="train", index=3)
        buffer.issue(
            [
                Ticket(group=g, member=m, group_size=SIZE, task=task, seed=10 * g + m)
                for g in range(3 * GROUPS)
                for m in range(SIZE)
            ]
        )
        # Asked of the buffer: an actor's heartbeat may miss episodes as short as these.
        until(lambda: any(ticket.holder == second for group in buffer.contents() for ticket in group.tickets))
        buffer.set_desired_actors(1)
        until(lambda: ray.get(pool.status.remote(), timeout=10)["actors"] == [first])
        # No lease ran out, and yet everything is played: the drained actor gave its tickets back.
        until(lambda: buffer.complete(TRAIN_STREAM) == list(range(3 * GROUPS)))
        played = [t for g in range(3 * GROUPS) for t in buffer.read(TRAIN_STREAM, g)]
        by_second = {span.version for t in played if t.actor == second for step in t.steps for span in step.versions}
        assert by_second <= {7}
        until(lambda: not ray.get(pool.status.remote(), timeout=10)["draining"])
        assert ray.get(pool.status.remote(), timeout=10)["deaths"] == 0
    finally:
        stop(pool)


def test_actors_that_cannot_start_are_tried_again_and_say_why(
    config: Config, redis_url: str, server: ServerProcess, tmp_path: Path
) -> None:
    broken = Config.model_validate(config.model_dump() | {"model": {"path": tmp_path / "nothing"}})
    pool, _ = start_pool(broken, redis_url=redis_url, env_urls={"counting": (server.url,)})
    try:
        until(lambda: ray.get(pool.status.remote(), timeout=30)["deaths"] >= 2)
        status = ray.get(pool.status.remote(), timeout=10)
        assert status["last_error"].startswith(f"model.path {tmp_path / 'nothing'} is not a folder")
        assert "\n" not in status["last_error"]
    finally:
        stop(pool)


async def test_replacements_that_die_do_not_fail_a_pool_in_which_an_actor_works(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_kill", lambda member: None)
    pool = Pool(RolloutSpec(config.model_dump_json(), "redis://none", {}))

    def member(name: str) -> Member:
        run, placed = (asyncio.get_running_loop().create_future() for _ in range(2))
        found = Member(name, None, run, placed, time.monotonic())
        pool._members.append(found)
        return found

    worker = member("worker")
    worker.worked = True
    for number in range(FAILING_CRASHES):
        assert (await pool.status())["failing"] is None
        member(f"newcomer {number}").run.set_exception(EngineFailed("no room"))
        pool._remove_ended()
    status = await pool.status()
    assert status["deaths_in_a_row"] == FAILING_CRASHES
    assert status["failing"] is None

    pool._members.remove(worker)
    assert (await pool.status())["failing"] == "no room"


async def test_a_plugin_that_ends_an_actor_fails_the_run_at_once(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_kill", lambda member: None)
    pool = Pool(RolloutSpec(config.model_dump_json(), "redis://none", {}))
    runs = [asyncio.get_running_loop().create_future() for _ in range(2)]
    placed = asyncio.get_running_loop().create_future()
    pool._members += [Member(f"a{number}", None, run, placed, time.monotonic()) for number, run in enumerate(runs)]
    pool._members[0].worked = True
    error = PluginError("prompt.parser=./mine.py:odd: KeyError: 'x' (mine.py:7)")
    runs[1].set_exception(RayTaskError("run", "Traceback …", error))
    pool._remove_ended()
    assert (await pool.status())["failing"] == str(error)


@pytest.mark.parametrize(
    ("there", "rollout", "wanted"),
    [
        (0.0, {"tensor_parallel": 2}, 0),
        (4.0, {"tensor_parallel": 2}, 2),
        (1.0, {}, 1),
        (1.0, {"share_gpus": True}, 0),
        (1.0, {"share_gpus": "turns"}, 0),
    ],
)
def test_an_engine_holds_as_many_gpus_as_it_has_workers(
    config: Config, there: float, rollout: dict[str, object], wanted: int
) -> None:
    settings = config.rollout.model_copy(update=rollout)
    assert engine_gpus(settings, {"CPU": 2.0} | ({"GPU": there} if there else {})) == wanted


class OptionsOf(Exception):
    """In place of the start of a Ray actor: what was asked of Ray for it."""


def test_an_actor_asks_ray_for_the_gpus_of_its_engine(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Remote:
        def options(self, **options: Any) -> None:
            raise OptionsOf(options)

    monkeypatch.setattr(ray, "remote", lambda *_: Remote())
    pool = Pool(RolloutSpec(config.model_dump_json(), "redis://none", {}, gpus=2))
    with pytest.raises(OptionsOf) as options:
        pool._start()
    assert options.value.args[0]["num_gpus"] == 2
    assert options.value.args[0]["resources"] == {"rollout": 1}


def test_an_engine_on_more_gpus_than_there_are_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {"rollout": config.rollout.model_dump() | {"tensor_parallel": 4}}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    with pytest.raises(RunStalled, match=r"tensor_parallel=4: the Ray cluster has 2 GPU"):
        start_pool(Config.model_validate(config.model_dump() | wide), redis_url="redis://none", env_urls={})


def test_secrets_are_not_in_the_description() -> None:
    spec = RolloutSpec("{}", "redis://:secret@host", {"e": ("http://env",)}, "token", scripted)
    assert "secret" not in repr(spec)
    assert "token" not in repr(spec).replace("env_token", "")
