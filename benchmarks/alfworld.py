"""Speed and memory of ALFWorld: the native engine, the official one, and an environment server under load.

`python -m benchmarks.alfworld [--json FILE]`. All play is random among admissible actions. A step includes everything
that the environment computes: feedback, admissible commands, reward, state digest. Rates of engines are for one core.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.server_load import BATCH, Figures, Player, measure_http, measure_memory, next_steps, results, serving
from env_servers.alfworld.environment import AlfWorld, game_source
from env_servers.alfworld.textworld_worker import TextWorldGame
from env_servers.arguments import positive, seconds
from env_servers.client import HttpClient
from env_servers.launch import ServerProcess
from env_servers.protocol import ResetRequest, StepResult

STEPS_PER_EPISODE = 50


def measure_native(seconds: float) -> Figures:
    """Return steps and resets per second of `AlfWorld`; the games are parsed once, as in a server."""
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
    """Return resets per second of new games, including reading or generating each game."""
    first = game_source().splits["train"] - games
    environment = AlfWorld()
    began = time.process_time()
    for index in range(games):
        environment.reset("train", first + index)
    return {"first_resets_per_s": games / (time.process_time() - began)}


def measure_textworld(seconds: float) -> Figures:
    """Return steps and resets per second of the official engine on the same games, in process."""
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


async def measure_http_batches(server: ServerProcess, sessions: int, seconds: float) -> Figures:
    """Return steps per second of `sessions` sessions that step together, `BATCH` per request."""
    client = HttpClient(server.url)
    rng = random.Random(0)
    steps = 0
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        live = results(await client.reset_many([PLAYER.task(number) for number in range(sessions)]))
        opened = [seen.session for seen in live]
        for _ in range(STEPS_PER_EPISODE):
            parts = [live[first : first + BATCH] for first in range(0, len(live), BATCH)]
            answers = await asyncio.gather(*(client.step_many(next_steps(part, PLAYER, rng)) for part in parts))
            steps += len(live)
            live = [seen for answer in answers for seen in results(answer) if not seen.done]
        for session in opened:
            await client.close_session(session)
    spent = time.monotonic() - began
    await client.close()
    return {"http_batch_steps_per_s": steps / spent}


def _task(number: int) -> ResetRequest:
    return ResetRequest(split="train", index=number % game_source().splits["train"], max_steps=STEPS_PER_EPISODE)


def _act(seen: StepResult, rng: random.Random) -> str:
    return rng.choice(seen.admissible or ["look"])


PLAYER = Player(_task, _act)


def measure(seconds: float, sessions: int, live: int) -> dict[str, object]:
    """Return all figures and a description of the machine."""
    native = {**measure_native(seconds), **measure_first_resets(64)}
    textworld = measure_textworld(seconds)
    with serving("alfworld") as server:
        memory = asyncio.run(measure_memory(server, PLAYER, live))
    with serving("alfworld") as server:
        http = asyncio.run(measure_http(server, PLAYER, sessions, seconds))
        http |= asyncio.run(measure_http_batches(server, sessions, seconds))
    return {
        "machine": record.machine(),
        "games": game_source().name,
        "native": native,
        "textworld": textworld,
        "server": {"sessions": sessions, "live_sessions": live, **http, **memory},
    }


def show(figures: Mapping[str, object], console: Console) -> None:
    """Print the figures as tables."""
    native, textworld, served = (record.section(figures, key) for key in ("native", "textworld", "server"))
    engines = Table(title=f"ALFWorld engines, {figures['games']} games, one core")
    for heading in ("", "native", "TextWorld", "ratio"):
        engines.add_column(heading, justify="right" if heading else "left")
    for label, key in (("steps/s", "steps_per_s"), ("resets/s", "resets_per_s")):
        ratio = native[key] / textworld[key]
        engines.add_row(label, f"{native[key]:,.0f}", f"{textworld[key]:,.2f}", f"{ratio:,.0f} ×")
    engines.add_row("resets/s, new game", f"{native['first_resets_per_s']:,.0f}", "", "")
    console.print(engines)
    table = Table(title=f"Environment server, {served['sessions']:.0f} sessions, one process", show_header=False)
    table.add_row("steps/s over HTTP, one per request", f"{served['http_steps_per_s']:,.0f}")
    table.add_row("server processor time per step", f"{served['http_server_cpu_us_per_step']:,.0f} µs")
    table.add_row(f"steps/s over HTTP, {BATCH} per request", f"{served['http_batch_steps_per_s']:,.0f}")
    table.add_row(f"memory added by {served['live_sessions']:,.0f} sessions", f"{served['memory_added_mib']:,.0f} MiB")
    console.print(table)


def main() -> None:
    parser = record.parser("Measure ALFWorld's engines and its environment server.")
    parser.add_argument("--seconds", type=seconds, default=10.0, help="duration of each measurement")
    parser.add_argument("--sessions", type=positive, default=128, help="sessions that play over HTTP at the same time")
    parser.add_argument("--live", type=positive, default=1000, help="live sessions in the memory measurement")
    options = parser.parse_args()
    figures = measure(options.seconds, options.sessions, options.live)
    show(figures, Console())
    record.keep(figures, options.json)


if __name__ == "__main__":
    main()
