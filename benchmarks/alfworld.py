"""Speed and memory of ALFWorld: the native engine beside the official one, and an environment server under load.

`python -m benchmarks.alfworld [--json FILE]`. Random admissible play throughout. A step counts all that a step of the
environment does: feedback, admissible commands, reward, state digest. Rates of the engines are those of one core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from env_servers.alfworld.environment import AlfWorld, game_source
from env_servers.alfworld.textworld_worker import TextWorldGame
from env_servers.client import HttpClient
from env_servers.launch import ServerProcess, start_server
from env_servers.protocol import Problem, ResetRequest, StepRequest, StepResult

STEPS_PER_EPISODE = 50
BATCH = 64
GROUP = 8
MIB = 1024 * 1024

Figures = dict[str, float]


def measure_native(seconds: float) -> Figures:
    """Steps and resets a second of `AlfWorld`; the games are parsed once, as in a server."""
    rng = random.Random(0)
    games = min(64, game_source().splits["train"])
    environment = AlfWorld()
    for index in range(games):
        environment.reset("train", index)
    spent = {"reset": 0.0, "step": 0.0}
    done = {"reset": 0, "step": 0}
    while sum(spent.values()) < seconds:
        began = time.process_time()
        seen = environment.reset("train", done["reset"] % games)
        spent["reset"] += time.process_time() - began
        done["reset"] += 1
        actions = [rng.random() for _ in range(STEPS_PER_EPISODE)]
        began = time.process_time()
        for draw in actions:
            admissible = seen.admissible or ()
            seen = environment.step(admissible[int(draw * len(admissible))])
        spent["step"] += time.process_time() - began
        done["step"] += STEPS_PER_EPISODE
    return {"steps_per_s": done["step"] / spent["step"], "resets_per_s": done["reset"] / spent["reset"]}


def measure_first_resets(games: int) -> Figures:
    """Resets a second of games that were never played: reading or making the game included."""
    first = game_source().splits["train"] - games
    environment = AlfWorld()
    began = time.process_time()
    for index in range(games):
        environment.reset("train", first + index)
    return {"first_resets_per_s": games / (time.process_time() - began)}


def measure_textworld(seconds: float) -> Figures:
    """Steps and resets a second of the official engine on the same games, in process."""
    rng = random.Random(0)
    game = TextWorldGame()
    spent = {"reset": 0.0, "step": 0.0}
    done = {"reset": 0, "step": 0}
    while sum(spent.values()) < seconds:
        document = game_source().document("train", done["reset"])
        began = time.process_time()
        game.start(document)
        spent["reset"] += time.process_time() - began
        done["reset"] += 1
        began = time.process_time()
        for _ in range(STEPS_PER_EPISODE):
            game.step(rng.choice(game.admissible))
        spent["step"] += time.process_time() - began
        done["step"] += STEPS_PER_EPISODE
    return {"steps_per_s": done["step"] / spent["step"], "resets_per_s": done["reset"] / spent["reset"]}


@contextmanager
def server() -> Iterator[ServerProcess]:
    """An environment server in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready"
        command = [sys.executable, "-m", "env_servers", "alfworld", "--port", "0", "--ready-file", str(ready)]
        with start_server(command, ready) as process:
            yield process


async def measure_http(url: str, sessions: int, seconds: float) -> Figures:
    """Steps a second of `sessions` clients that each wait for their answer; every game is played `GROUP` times.

    Resets and closes between the episodes take their time but are not counted as steps.
    """
    client = HttpClient(url, connections=sessions)
    steps = 0
    tasks = count()

    async def play(number: int, until: float) -> None:
        nonlocal steps
        rng = random.Random(number)
        while time.monotonic() < until:
            seen = await client.reset(_task(next(tasks) // GROUP))
            while not seen.done and time.monotonic() < until:
                seen = await client.step(seen.session, seen.step + 1, rng.choice(seen.admissible or ["look"]))
                steps += 1
            await client.close_session(seen.session)

    began = time.monotonic()
    await asyncio.gather(*(play(number, began + seconds) for number in range(sessions)))
    spent = time.monotonic() - began
    await client.close()
    return {"http_steps_per_s": steps / spent, "http_steps": float(steps)}


async def measure_http_batches(url: str, sessions: int, seconds: float) -> Figures:
    """Steps a second of `sessions` sessions that are stepped together, `BATCH` to a request."""
    client = HttpClient(url)
    rng = random.Random(0)
    steps = 0
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        live = _results(await client.reset_many([_task(number) for number in range(sessions)]))
        opened = [seen.session for seen in live]
        for _ in range(STEPS_PER_EPISODE):
            parts = [live[first : first + BATCH] for first in range(0, len(live), BATCH)]
            answers = await asyncio.gather(*(client.step_many(_steps(part, rng)) for part in parts))
            steps += len(live)
            live = [seen for answer in answers for seen in _results(answer) if not seen.done]
        for session in opened:
            await client.close_session(session)
    spent = time.monotonic() - began
    await client.close()
    return {"http_batch_steps_per_s": steps / spent}


async def measure_memory(process: ServerProcess, sessions: int) -> Figures:
    """MiB that `sessions` live sessions add to a fresh server, each on a game of its own and some steps into it."""
    client = HttpClient(process.url, connections=16)
    first = await client.reset(_task(0))
    await client.close_session(first.session)
    before = psutil.Process(process.pid).memory_info().rss
    rng = random.Random(0)
    for start in range(0, sessions, BATCH):
        requests = [_task(number) for number in range(start, min(start + BATCH, sessions))]
        live = _results(await client.reset_many(requests))
        for _ in range(3):
            live = _results(await client.step_many(_steps(live, rng)))
    added = psutil.Process(process.pid).memory_info().rss - before
    await client.close()
    return {"memory_added_mib": added / MIB, "server_rss_mib": (before + added) / MIB}


def _cpu_seconds(process: ServerProcess) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def _task(number: int) -> ResetRequest:
    return ResetRequest(split="train", index=number % game_source().splits["train"], max_steps=STEPS_PER_EPISODE)


def _steps(live: Sequence[StepResult], rng: random.Random) -> list[StepRequest]:
    return [
        StepRequest(session=seen.session, step=seen.step + 1, action=rng.choice(seen.admissible or ["look"]))
        for seen in live
        if not seen.done
    ]


def _results(answers: Sequence[StepResult | Problem]) -> list[StepResult]:
    problems = [answer.detail for answer in answers if isinstance(answer, Problem)]
    if problems:
        raise RuntimeError(f"the server refused: {problems[0]}")
    return [answer for answer in answers if isinstance(answer, StepResult)]


def measure(seconds: float, sessions: int, live: int) -> dict[str, object]:
    """All figures, with what they were measured on."""
    native = {**measure_native(seconds), **measure_first_resets(64)}
    textworld = measure_textworld(seconds)
    with server() as process:
        memory = asyncio.run(measure_memory(process, live))
    with server() as process:
        before = _cpu_seconds(process)
        http = asyncio.run(measure_http(process.url, sessions, seconds))
        http["http_server_cpu_us_per_step"] = 1e6 * (_cpu_seconds(process) - before) / http.pop("http_steps")
        http |= asyncio.run(measure_http_batches(process.url, sessions, seconds))
    return {
        "machine": {"cores": psutil.cpu_count(), "python": platform.python_version(), "load": psutil.getloadavg()[0]},
        "games": game_source().name,
        "native": native,
        "textworld": textworld,
        "server": {"sessions": sessions, "live_sessions": live, **http, **memory},
    }


def show(figures: Mapping[str, object], console: Console) -> None:
    """Print the figures as tables."""
    native, textworld, served = (_section(figures, key) for key in ("native", "textworld", "server"))
    engines = Table(title=f"ALFWorld engines, {figures['games']} games, one core")
    for heading in ("", "native", "TextWorld", "ratio"):
        engines.add_column(heading, justify="right" if heading else "left")
    for label, key in (("steps/s", "steps_per_s"), ("resets/s", "resets_per_s")):
        ratio = native[key] / textworld[key]
        engines.add_row(label, f"{native[key]:,.0f}", f"{textworld[key]:,.2f}", f"{ratio:,.0f} ×")
    engines.add_row("resets/s, new game", f"{native['first_resets_per_s']:,.0f}", "", "")
    console.print(engines)
    table = Table(title=f"Environment server, {served['sessions']:.0f} sessions, one process", show_header=False)
    table.add_row("steps/s over HTTP, one a request", f"{served['http_steps_per_s']:,.0f}")
    table.add_row("processor time of the server a step", f"{served['http_server_cpu_us_per_step']:,.0f} µs")
    table.add_row(f"steps/s over HTTP, {BATCH} a request", f"{served['http_batch_steps_per_s']:,.0f}")
    table.add_row(f"memory added by {served['live_sessions']:,.0f} sessions", f"{served['memory_added_mib']:,.0f} MiB")
    console.print(table)


def _section(figures: Mapping[str, object], key: str) -> Figures:
    section = figures[key]
    assert isinstance(section, dict)
    return section


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure ALFWorld's engines and its environment server.")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement")
    parser.add_argument("--sessions", type=int, default=128, help="sessions that play over HTTP at the same time")
    parser.add_argument("--live", type=int, default=1000, help="live sessions whose memory is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    figures = measure(options.seconds, options.sessions, options.live)
    show(figures, Console())
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
