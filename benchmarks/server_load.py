"""Measure an environment server in its own process: the cost of a step over HTTP, and of a live session."""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psutil

from env_servers.client import HttpClient
from env_servers.launch import ServerProcess, start_server
from env_servers.protocol import Problem, ResetRequest, StepRequest, StepResult

BATCH = 64
GROUP = 8
START_S = 120.0
MIB = 1024 * 1024

Figures = dict[str, float]


@dataclass(frozen=True)
class Player:
    """`task` returns the task of any number; `act` returns the next action."""

    task: Callable[[int], ResetRequest]
    act: Callable[[StepResult, random.Random], str]


@contextmanager
def running(command: Sequence[str]) -> Iterator[ServerProcess]:
    """Run a server in its own process; `--ready-file` tells the command where to write its URL."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready"
        with start_server([*command, "--ready-file", str(ready)], ready, timeout_s=START_S) as server:
            yield server


@contextmanager
def serving(environment: str, *options: str) -> Iterator[ServerProcess]:
    """Run one of our environment servers."""
    with running([sys.executable, "-m", "env_servers", environment, "--port", "0", *options]) as server:
        yield server


async def measure_http(server: ServerProcess, player: Player, sessions: int, seconds: float) -> Figures:
    """Return steps per second of `sessions` clients, each waiting for its response; each task is played `GROUP` times.

    Resets and closes between the episodes take time but do not count as steps.
    """
    client = HttpClient(server.url, connections=sessions)
    steps = 0
    tasks = count()

    async def play(number: int, until: float) -> None:
        nonlocal steps
        rng = random.Random(number)
        while time.monotonic() < until:
            seen = await client.reset(player.task(next(tasks) // GROUP))
            while not seen.done and time.monotonic() < until:
                seen = await client.step(seen.session, seen.step + 1, player.act(seen, rng))
                steps += 1
            await client.close_session(seen.session)

    began, cpu_began = time.monotonic(), cpu_seconds(server)
    await asyncio.gather(*(play(number, began + seconds) for number in range(sessions)))
    spent, cpu = time.monotonic() - began, cpu_seconds(server) - cpu_began
    await client.close()
    return {"http_steps_per_s": steps / spent, "http_server_cpu_us_per_step": 1e6 * cpu / steps}


async def measure_memory(server: ServerProcess, player: Player, sessions: int) -> Figures:
    """Return the MiB that `sessions` live sessions add to a new server, each on its own task and some steps into it."""
    client = HttpClient(server.url, connections=16)
    first = await client.reset(player.task(0))
    await client.close_session(first.session)
    before = psutil.Process(server.pid).memory_info().rss
    rng = random.Random(0)
    for start in range(0, sessions, BATCH):
        requests = [player.task(number) for number in range(start, min(start + BATCH, sessions))]
        live = results(await client.reset_many(requests))
        for _ in range(3):
            live = results(await client.step_many(next_steps(live, player, rng)))
    rss = psutil.Process(server.pid).memory_info().rss
    await client.close()
    return {"memory_added_mib": (rss - before) / MIB, "server_rss_mib": rss / MIB}


def next_steps(live: Sequence[StepResult], player: Player, rng: random.Random) -> list[StepRequest]:
    """Return the next step of each episode that has not ended."""
    return [
        StepRequest(session=seen.session, step=seen.step + 1, action=player.act(seen, rng))
        for seen in live
        if not seen.done
    ]


def results(answers: Sequence[StepResult | Problem]) -> list[StepResult]:
    """Return the results of a batch. Raises RuntimeError if one of them is a problem."""
    problems = [answer.detail for answer in answers if isinstance(answer, Problem)]
    if problems:
        raise RuntimeError(f"the server rejected a request: {problems[0]}")
    return [answer for answer in answers if isinstance(answer, StepResult)]


def cpu_seconds(server: ServerProcess) -> float:
    """Return the processor time of the server and its workers, in seconds."""
    process = psutil.Process(server.pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))
