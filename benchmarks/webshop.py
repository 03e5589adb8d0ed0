"""Speed and memory of WebShop: the environment in process, and its server under load.

`python -m benchmarks.webshop [--json FILE]`. The variables of `env_servers.webshop.settings` choose the products, as
for a server. A step counts all that a step of an environment does: page text, admissible actions, reward, state digest.
Oracle play counts the expert too, who plans at every reset. Rates in process are those of one core's time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from env_servers.client import HttpClient
from env_servers.environment import Observation
from env_servers.launch import ServerProcess, start_server
from env_servers.protocol import FREE_TEXT, Problem, ResetRequest, StepRequest, StepResult
from env_servers.webshop.environment import WebShop, shop

STEPS_PER_EPISODE = 15
BATCH = 64
GROUP = 8
MIB = 1024 * 1024

Figures = dict[str, float]
Choose = Callable[[Observation, random.Random], str]


def random_action(seen: Observation | StepResult, rng: random.Random) -> str:
    """Any admissible action; a search is for some words of the instruction."""
    words = str(seen.facts["goal"]).split()
    action = rng.choice(seen.admissible or ["click[back to search]"])
    return action.replace(FREE_TEXT, " ".join(rng.sample(words, min(len(words), rng.randint(1, 5)))))


def expert_action(seen: Observation, rng: random.Random) -> str:
    return seen.expert or "click[back to search]"


def measure_play(choose: Choose, seconds: float, *, expert: bool = False) -> Figures:
    """Steps a second of whole episodes, resets included, and how many of them were won. Every task is new."""
    rng = random.Random(0)
    environment = WebShop()
    tasks = list(range(WebShop.splits()["train"]))
    rng.shuffle(tasks)
    steps = won = played = 0
    began = time.process_time()
    while time.process_time() - began < seconds and played < len(tasks):
        seen = environment.reset("train", tasks[played], expert=expert)
        played += 1
        for _ in range(STEPS_PER_EPISODE):
            seen = environment.step(choose(seen, rng))
            steps += 1
            if seen.terminated:
                break
        won += seen.facts["won"] is True
    spent = time.process_time() - began
    return {"steps_per_s": steps / spent, "episodes": played, "won": won / played}


def measure_resets(seconds: float) -> Figures:
    environment = WebShop()
    size = WebShop.splits()["train"]
    resets = 0
    began = time.process_time()
    while time.process_time() - began < seconds:
        environment.reset("train", resets % size)
        resets += 1
    return {"resets_per_s": resets / (time.process_time() - began)}


@contextmanager
def server() -> Iterator[ServerProcess]:
    """An environment server in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready"
        command = [sys.executable, "-m", "env_servers", "webshop", "--port", "0", "--ready-file", str(ready)]
        with start_server(command, ready) as process:
            yield process


async def measure_http(url: str, sessions: int, seconds: float) -> Figures:
    """Steps a second of `sessions` clients that each wait for their answer; every task is played `GROUP` times.

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
                seen = await client.step(seen.session, seen.step + 1, random_action(seen, rng))
                steps += 1
            await client.close_session(seen.session)

    began = time.monotonic()
    await asyncio.gather(*(play(number, began + seconds) for number in range(sessions)))
    spent = time.monotonic() - began
    await client.close()
    return {"http_steps_per_s": steps / spent, "http_steps": float(steps)}


async def measure_memory(process: ServerProcess, sessions: int) -> Figures:
    """MiB that `sessions` live sessions add to a fresh server, each on a task of its own and some steps into it."""
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
    rss = psutil.Process(process.pid).memory_info().rss
    await client.close()
    return {"memory_added_mib": (rss - before) / MIB, "server_rss_mib": rss / MIB}


def _task(number: int) -> ResetRequest:
    size = WebShop.splits()["train"]
    return ResetRequest(split="train", index=number % size, max_steps=STEPS_PER_EPISODE)


def _steps(live: Sequence[StepResult], rng: random.Random) -> list[StepRequest]:
    return [
        StepRequest(session=seen.session, step=seen.step + 1, action=random_action(seen, rng))
        for seen in live
        if not seen.done
    ]


def _results(answers: Sequence[StepResult | Problem]) -> list[StepResult]:
    problems = [answer.detail for answer in answers if isinstance(answer, Problem)]
    if problems:
        raise RuntimeError(f"the server refused: {problems[0]}")
    return [answer for answer in answers if isinstance(answer, StepResult)]


def _cpu_seconds(process: ServerProcess) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def measure(seconds: float, sessions: int, live: int) -> dict[str, object]:
    """All figures, with what they were measured on."""
    began = time.process_time()
    products, goals = len(shop().products), len(shop().goals)
    native: dict[str, object] = {"open_s": time.process_time() - began}
    native["random"] = measure_play(random_action, seconds)
    native["oracle"] = measure_play(expert_action, seconds, expert=True)
    native |= measure_resets(min(seconds, 2.0))
    native["process_peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with server() as process:
        memory = asyncio.run(measure_memory(process, live))
    with server() as process:
        before = _cpu_seconds(process)
        http = asyncio.run(measure_http(process.url, sessions, seconds))
        http["http_server_cpu_us_per_step"] = 1e6 * (_cpu_seconds(process) - before) / http.pop("http_steps")
    return {
        "machine": {"cores": psutil.cpu_count(), "python": platform.python_version(), "load": psutil.getloadavg()[0]},
        "shop": {"products": products, "goals": goals, **WebShop.about()},
        "native": native,
        "server": {"sessions": sessions, "live_sessions": live, **http, **memory},
    }


def show(figures: Mapping[str, object], console: Console) -> None:
    """Print the figures as tables."""
    sold, native, served = (_section(figures, key) for key in ("shop", "native", "server"))
    table = Table(title=f"WebShop, {sold['products']:,} products, {sold['goals']:,} goals ({sold['source']}), one core")
    for heading in ("", "random", "oracle"):
        table.add_column(heading, justify="right" if heading else "left")
    players = [_section(native, key) for key in ("random", "oracle")]
    table.add_row("steps/s, resets included", *(f"{player['steps_per_s']:,.0f}" for player in players))
    table.add_row("episodes won", *(f"{player['won']:.1%} of {player['episodes']:,}" for player in players))
    console.print(table)
    table = Table(title=f"Environment server, {served['sessions']} sessions, one process", show_header=False)
    table.add_row("resets/s in process", f"{native['resets_per_s']:,.0f}")
    table.add_row("processor time to open the shop", f"{native['open_s']:.1f} s")
    table.add_row("steps/s over HTTP, one a request", f"{served['http_steps_per_s']:,.0f}")
    table.add_row("processor time of the server a step", f"{served['http_server_cpu_us_per_step']:,.0f} µs")
    table.add_row(f"memory added by {served['live_sessions']:,} sessions", f"{served['memory_added_mib']:,.0f} MiB")
    table.add_row("memory of the server with them", f"{served['server_rss_mib']:,.0f} MiB")
    console.print(table)


def _section(figures: Mapping[str, object], key: str) -> dict[str, object]:
    section = figures[key]
    assert isinstance(section, dict)
    return section


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure WebShop and its environment server.")
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
