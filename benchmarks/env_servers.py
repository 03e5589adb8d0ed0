"""Throughput of every environment's server, and of OpenEnv's echo server with OpenEnv's client, in one run.

`python -m benchmarks.env_servers [--json FILE]`. On loopback, client included: `--sessions` sessions play random
admissible actions, each waiting for its response. Resets and closes take time but do not count as steps. An environment
steps, renders its observation and lists the admissible actions; the echo server returns its input.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.server_load import GROUP, Figures, cpu_seconds, running, serving
from env_servers.arguments import positive, seconds
from env_servers.client import HttpClient
from env_servers.free_text import fill
from env_servers.launch import ServerProcess
from env_servers.protocol import ResetRequest
from env_servers.registry import ENVIRONMENTS, load_environment
from tests.env_servers.openenv.venvs import NoOpenEnv, python_with_openenv

SCRIPTS = Path(__file__).resolve().parents[1] / "tests" / "env_servers" / "openenv"
MAX_STEPS = 50
WARM_S = 2.0
WIDTH = 110
ECHOES = {"tools": "echo_env, a tool", "plain": "bare echo"}


async def load(server: ServerProcess, sessions: int, seconds: float, coalesce: bool) -> Figures:
    """Return steps per second of `sessions` players, and the server's processor time per step."""
    client = HttpClient(server.url, connections=sessions, coalesce=coalesce)
    info = await client.info()
    split, size = next(iter(info.splits.items()))
    steps = episodes = 0
    until = time.monotonic() + WARM_S + seconds
    counting = False

    async def play(number: int) -> None:
        nonlocal steps, episodes
        rng = random.Random(number)
        while time.monotonic() < until:
            index = (number + episodes) // GROUP % size
            episodes += 1
            seen = await client.reset(ResetRequest(split=split, index=index, max_steps=MAX_STEPS))
            while not seen.done and time.monotonic() < until:
                action = fill(rng.choice(seen.admissible or ["look"]), seen, rng)
                seen = await client.step(seen.session, seen.step + 1, action)
                steps += counting
            await client.close_session(seen.session)

    async def measure() -> Figures:
        nonlocal counting
        await asyncio.sleep(WARM_S)
        counting, began, before = True, time.monotonic(), cpu_seconds(server)
        await asyncio.sleep(seconds - 0.01)
        spent, cpu, counted = time.monotonic() - began, cpu_seconds(server) - before, steps
        return {"steps_per_s": counted / spent, "server_cpu_us_per_step": 1e6 * cpu / max(1, counted)}

    measuring = asyncio.create_task(measure())
    await asyncio.gather(*(play(number) for number in range(sessions)))
    await client.close()
    return await measuring


def measure_environment(name: str, sessions: int, seconds: float, workers: int) -> dict[str, Figures]:
    """Measure with one request per step, and with concurrent steps coalesced into one request."""
    with serving(name, "--workers", str(workers)) as server:
        return {
            "one_a_request": asyncio.run(load(server, sessions, seconds, coalesce=False)),
            "coalesced": asyncio.run(load(server, sessions, seconds, coalesce=True)),
        }


def measure_echo(kind: str, sessions: int, seconds: float) -> Figures:
    """Return steps per second of an echo server of the real OpenEnv with its client. Raises NoOpenEnv."""
    python = str(python_with_openenv("0.10"))
    serve = [python, str(SCRIPTS / "echo_server.py"), kind, "--sessions", str(sessions)]
    with running(serve) as server:
        play = [python, str(SCRIPTS / "echo_load.py"), kind, server.url, "--sessions", str(sessions)]
        timing = ["--seconds", str(seconds), "--warm", str(WARM_S)]
        done = subprocess.run(
            [*play, *timing], capture_output=True, text=True, timeout=seconds + WARM_S + 120.0, check=True
        )
    found: Figures = json.loads(done.stdout)
    return found


def measure(names: list[str], sessions: int, seconds: float, workers: int) -> dict[str, object]:
    """Return all figures and a description of the machine. Without OpenEnv, the echo figures are missing."""
    console = Console(stderr=True)
    echoes: dict[str, Figures] = {}
    try:
        for kind in ECHOES:
            console.print(f"OpenEnv, {ECHOES[kind]} …")
            echoes[kind] = measure_echo(kind, sessions, seconds)
    except NoOpenEnv as error:
        console.print(f"OpenEnv skipped: {error}")
    environments: dict[str, dict[str, Figures]] = {}
    for name in names:
        console.print(f"{name} …")
        environments[name] = measure_environment(name, sessions, seconds, workers)
    return {
        "machine": record.machine(),
        "sessions": sessions,
        "workers": workers,
        "seconds": seconds,
        "openenv": echoes,
        "environments": environments,
    }


def show(figures: Mapping[str, object], console: Console) -> None:
    """Print the figures as a table."""
    echoes, environments = figures["openenv"], figures["environments"]
    assert isinstance(echoes, dict)
    assert isinstance(environments, dict)
    table = Table(title=f"Steps per second, {figures['sessions']} sessions, loopback, client included")
    for heading in ("server and client", "steps/s", "server CPU, µs", *(f"× {ECHOES[kind]}" for kind in echoes)):
        table.add_column(heading, justify="left" if heading == "server and client" else "right")
    rates = {kind: found["steps_per_s"] for kind, found in echoes.items()}
    for kind, rate in rates.items():
        table.add_row(f"OpenEnv 0.10, {ECHOES[kind]}", f"{rate:,.0f}", "", *_ratios(rate, rates))
    for name, found in environments.items():
        for label, key in (("one step per request", "one_a_request"), ("coalesced steps", "coalesced")):
            rate = found[key]["steps_per_s"]
            cpu = f"{found[key]['server_cpu_us_per_step']:,.0f}"
            table.add_row(f"{name}, {label}", f"{rate:,.0f}", cpu, *_ratios(rate, rates))
    console.print(table)


def _ratios(rate: float, rates: Mapping[str, float]) -> list[str]:
    return [f"{rate / other:,.1f}" for other in rates.values()]


def main() -> None:
    quick = [name for name in ENVIRONMENTS if not load_environment(name).blocking]
    parser = record.parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("environments", nargs="*", default=quick, help=f"names ({', '.join(quick)})")
    parser.add_argument("--seconds", type=seconds, default=10.0, help="duration of each measurement")
    parser.add_argument("--sessions", type=positive, default=128, help="sessions that play at the same time")
    parser.add_argument("--workers", type=positive, default=1, help="processes of each server")
    options = parser.parse_args()
    figures = measure(options.environments, options.sessions, options.seconds, options.workers)
    show(figures, Console(width=WIDTH))
    record.keep(figures, options.json)


if __name__ == "__main__":
    main()
