"""Speed and memory of WebShop: the environment in process, and its server under load.

`python -m benchmarks.webshop [--json FILE]`. The variables of `env_servers.webshop.settings` select the products, as
for a server. A step includes everything that the environment computes: page text, admissible actions, reward, state
digest. Oracle play includes the expert, which plans at every reset. Rates in process are for one core.
"""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.server_load import Figures, Player, measure_http, measure_memory, serving
from env_servers.arguments import positive, seconds
from env_servers.environment import Observation
from env_servers.protocol import FREE_TEXT, ResetRequest, StepResult
from env_servers.webshop.environment import WebShop, shop

STEPS_PER_EPISODE = 15

Choose = Callable[[Observation, random.Random], str]


def random_action(seen: Observation | StepResult, rng: random.Random) -> str:
    """Return a random admissible action; a search uses random words of the instruction."""
    words = str(seen.facts["goal"]).split()
    action = rng.choice(seen.admissible or ["click[back to search]"])
    return action.replace(FREE_TEXT, " ".join(rng.sample(words, min(len(words), rng.randint(1, 5)))))


def expert_action(seen: Observation, rng: random.Random) -> str:
    return seen.expert or "click[back to search]"


def measure_play(choose: Choose, seconds: float, *, expert: bool = False) -> Figures:
    """Return steps per second of whole episodes, resets included, and the share won. Each task is played once."""
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


def _task(number: int) -> ResetRequest:
    size = WebShop.splits()["train"]
    return ResetRequest(split="train", index=number % size, max_steps=STEPS_PER_EPISODE)


def measure(seconds: float, sessions: int, live: int) -> dict[str, object]:
    """Return all figures and a description of the machine."""
    began = time.process_time()
    products, goals = len(shop().products), len(shop().goals)
    native: dict[str, object] = {"open_s": time.process_time() - began}
    native["random"] = measure_play(random_action, seconds)
    native["oracle"] = measure_play(expert_action, seconds, expert=True)
    native |= measure_resets(min(seconds, 2.0))
    native["process_peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    player = Player(_task, random_action)
    with serving("webshop") as server:
        memory = asyncio.run(measure_memory(server, player, live))
    with serving("webshop") as server:
        http = asyncio.run(measure_http(server, player, sessions, seconds))
    return {
        "machine": record.machine(),
        "shop": {"products": products, "goals": goals, **WebShop.about()},
        "native": native,
        "server": {"sessions": sessions, "live_sessions": live, **http, **memory},
    }


def show(figures: Mapping[str, object], console: Console) -> None:
    """Print the figures as tables."""
    sold, native, served = (record.section(figures, key) for key in ("shop", "native", "server"))
    table = Table(title=f"WebShop, {sold['products']:,} products, {sold['goals']:,} goals ({sold['source']}), one core")
    for heading in ("", "random", "oracle"):
        table.add_column(heading, justify="right" if heading else "left")
    players = [record.section(native, key) for key in ("random", "oracle")]
    table.add_row("steps/s, resets included", *(f"{player['steps_per_s']:,.0f}" for player in players))
    table.add_row("episodes won", *(f"{player['won']:.1%} of {player['episodes']:,}" for player in players))
    console.print(table)
    table = Table(title=f"Environment server, {served['sessions']} sessions, one process", show_header=False)
    table.add_row("resets/s in process", f"{native['resets_per_s']:,.0f}")
    table.add_row("processor time to load the shop", f"{native['open_s']:.1f} s")
    table.add_row("steps/s over HTTP, one per request", f"{served['http_steps_per_s']:,.0f}")
    table.add_row("server processor time per step", f"{served['http_server_cpu_us_per_step']:,.0f} µs")
    table.add_row(f"memory added by {served['live_sessions']:,} sessions", f"{served['memory_added_mib']:,.0f} MiB")
    table.add_row("memory of the server with these", f"{served['server_rss_mib']:,.0f} MiB")
    console.print(table)


def main() -> None:
    parser = record.parser("Measure WebShop and its environment server.")
    parser.add_argument("--seconds", type=seconds, default=10.0, help="duration of each measurement")
    parser.add_argument("--sessions", type=positive, default=128, help="sessions that play over HTTP at the same time")
    parser.add_argument("--live", type=positive, default=1000, help="live sessions in the memory measurement")
    options = parser.parse_args()
    figures = measure(options.seconds, options.sessions, options.live)
    show(figures, Console())
    record.keep(figures, options.json)


if __name__ == "__main__":
    main()
