"""ALFWorld on the official engine: the same episodes, in processes that end when they should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest

from env_servers.alfworld.environment import AlfWorld
from env_servers.alfworld.games import GameSource
from env_servers.environment import BrokenTask, Environment, Observation
from tests import needs

pytest.importorskip("textworld", reason=needs.TEXTWORLD)
from env_servers.alfworld import textworld_engine
from env_servers.alfworld.textworld_engine import EngineFailure, TextWorldAlfWorld, TextWorldPlay, WorkerPool

Document = dict[str, object]


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(1)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def shared_pool(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textworld_engine, "worker_pool", lambda: pool)


def _gone(pid: int | None) -> bool:
    try:
        psutil.Process(pid).wait(timeout=20)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


def _play(environment: Environment, index: int) -> list[Observation]:
    seen = [environment.reset("valid_seen", index, expert=True)]
    seen.append(environment.step("dance"))
    while not seen[-1].terminated and len(seen) < 12:
        seen.append(environment.step(str(seen[-1].expert)))
    return seen


def _but_for_digest(seen: list[Observation]) -> list[tuple[object, ...]]:
    return [(s.text, s.reward, s.terminated, s.admissible, s.facts, s.expert) for s in seen]


def test_same_episode_as_the_native_engine(generated_games: GameSource) -> None:
    assert TextWorldAlfWorld.blocking
    assert TextWorldAlfWorld.about() == {**AlfWorld.about(), "engine": "textworld"}
    official = TextWorldAlfWorld()
    seen = _play(official, 1)
    assert _but_for_digest(seen) == _but_for_digest(_play(AlfWorld(), 1))
    assert seen[0].state == seen[1].state != seen[2].state
    official.close()
    official.close()


def test_games_with_rules_of_their_own(kitchen: Callable[..., Document], pool: WorkerPool) -> None:
    document = kitchen()
    document["grammar"] = str(document["grammar"]).replace("You open the", "You pull at the")
    play = TextWorldPlay(document, pool)
    play.step("go to drawer 1")
    assert play.step("open drawer 1").startswith("You pull at the drawer 1.")
    play.close()


def test_workers_are_used_again(kitchen: Callable[..., Document], pool: WorkerPool) -> None:
    play = TextWorldPlay(kitchen(), pool)
    pid = play.pid
    play.step("go to countertop 1")
    play.close()
    again = TextWorldPlay(kitchen("look_at_obj_in_light"), pool)
    assert again.pid == pid
    assert again.step("go to sidetable 1").startswith("You arrive at sidetable 1.")
    again.close()
    with pytest.raises(EngineFailure, match="is not running: reset the session"):
        again.step("look")


def test_game_that_the_engine_cannot_load(kitchen: Callable[..., Document], pool: WorkerPool) -> None:
    document = kitchen()
    document["pddl_problem"] = str(document["pddl_problem"]).replace("(:objects", "(:things")
    with pytest.raises(BrokenTask, match="TextWorld cannot play this game: ") as caught:
        TextWorldPlay(document, pool)
    assert "\n" not in str(caught.value)


def test_worker_that_dies(kitchen: Callable[..., Document], pool: WorkerPool) -> None:
    play = TextWorldPlay(kitchen(), pool)
    assert play.pid is not None
    os.kill(play.pid, signal.SIGKILL)
    with pytest.raises(EngineFailure, match=r"died \(exit code -9\)"):
        play.step("look")
    with pytest.raises(EngineFailure, match="is not running: reset the session"):
        play.step("look")


def test_worker_that_is_too_slow(
    kitchen: Callable[..., Document], pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = TextWorldPlay(kitchen(), pool)
    pid = play.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(textworld_engine, "STEP_TIMEOUT_S", 0.2)
    with pytest.raises(EngineFailure, match=r"did not respond in 0\.2 s"):
        play.step("look")
    assert _gone(pid)


PARENT = """
import os, signal, sys
from env_servers.alfworld.generator import generate
from env_servers.alfworld.textworld_engine import Worker
worker = Worker()
sys.stdout.write(str(worker.pid) + chr(10))
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_worker_ends_with_its_parent() -> None:
    process = subprocess.run([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, timeout=60, check=False)
    assert process.returncode == -signal.SIGKILL
    assert _gone(int(process.stdout))
