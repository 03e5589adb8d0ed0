"""The elastic run: 1 → 3 → 1 rollout actors while training, by wishes and then by nodes that come and go.

    python -m tests.chaos.elastic [--seconds 45] [--updates 24] [--latency 0.4] [--out runs/elastic] [--json FILE]

Each phase is measured once its actors play: sampled tokens a second over all actors, and groups trained on a second.
Each step of the environment takes `--latency` seconds, and an actor plays few episodes at a time, so that actors wait
for their environments more than for a processor: three then play three times as much even where they share two cores.
With `--latency 0` the environment answers at once, and the processors are what limits them.

Exit code 1 when a group was lost, trained on twice or too old, or when throughput did not follow the actors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from env_servers.launch import start_server
from tests.chaos.history import given_up, judge
from tests.chaos.run import MAX_STALENESS, RECIPE, START_S
from tests.chaos.scene import Nodes, Run, wait_for
from tests.chaos.slow import STEP_VARIABLE

PHASES = (1, 3, 1)
PER_UPDATE = 4
FOLLOWS = 1.8
"""At least so many times the tokens a second with three actors, where they wait for their environments."""
SLOW = ["rollout.episodes_in_flight=8"]
Figures = dict[str, float]


def sampled(run: Run) -> dict[str, int]:
    """Response tokens of each actor that plays."""
    return {name: int(str(facts["response_tokens"])) for name, facts in run.playing().items()}


def measure(run: Run, seconds: float) -> Figures:
    """Rates over the next seconds; ends early with the run."""
    before, trained, began = sampled(run), len(run.ledger()), time.monotonic()
    while time.monotonic() - began < seconds and run.keep_running():
        time.sleep(0.5)
    after, spent = sampled(run), time.monotonic() - began
    tokens = sum(count - before.get(name, 0) for name, count in after.items())
    return {
        "actors": len(after),
        "tokens_per_s": round(tokens / spent, 1),
        "groups_per_s": round((len(run.ledger()) - trained) / spent, 3),
    }


def by_wish(run: Run, nodes: Nodes, wanted: int) -> None:
    run.ask(lambda buffer: buffer.set_desired_actors(wanted))


def by_node(run: Run, nodes: Nodes, wanted: int) -> None:
    while nodes.others < wanted - 1:
        nodes.add()
    while nodes.others > wanted - 1:
        nodes.stop()


def play(
    name: str, out: Path, recipe: Sequence[str], seconds: float, scale: Callable[[Run, Nodes, int], None]
) -> dict[str, object]:
    """One run over the phases, to its end."""
    nodes = Nodes(head_places=max(PHASES) if scale is by_wish else 1)
    try:
        with Run(name, out, recipe, nodes.address) as run:
            phases: list[Figures] = []
            for wanted in PHASES:
                wait_for(lambda: bool(run.ask(lambda buffer: buffer.state())), START_S, run)
                scale(run, nodes, wanted)
                reached = wait_for(lambda wanted=wanted: len(run.playing()) == wanted, START_S, run)  # type: ignore[misc]
                phases.append({"wanted": wanted, "reached_s": round(reached, 1)} | measure(run, seconds))
            while run.keep_running():
                time.sleep(1.0)
    finally:
        nodes.close()
    verdict = judge(run.ledger(), given_up([run.output()]), per_update=PER_UPDATE, max_staleness=MAX_STALENESS)
    return {"phases": phases, "follows": follows(phases), "updates": run.update(), **asdict(verdict)}


def follows(phases: Sequence[Figures]) -> float:
    """Tokens a second with the most actors over those with one, before and after."""
    [before, most, after] = [phase["tokens_per_s"] for phase in phases]
    return round(most / max(before, after), 2)


@contextmanager
def environment(out: Path, latency_s: float) -> Iterator[list[str]]:
    """Overrides of a run that plays against an environment as slow as that."""
    if not latency_s:
        yield []
        return
    os.environ[STEP_VARIABLE] = str(latency_s)
    ready = out / "slow.url"
    command = [sys.executable, "-m", "env_servers", "tests.chaos.slow:SlowAlfWorld", "--port", "0", "--threads", "64"]
    with start_server([*command, "--ready-file", str(ready)], ready) as server:
        yield [*SLOW, f"env.url={server.url}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45.0, help="length of a phase")
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--latency", type=float, default=0.4, help="seconds a step of the environment takes")
    parser.add_argument("--out", type=Path, default=Path("runs/elastic"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    out: Path = args.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with environment(out, args.latency) as overrides:
        sizes = [f"learner.updates={args.updates}", f"learner.groups_per_update={PER_UPDATE}"]
        recipe = [*RECIPE, *sizes, *overrides]
        figures = {
            "by_wish": play("by-wish", out, recipe, args.seconds, by_wish),
            "by_node": play("by-node", out, recipe, args.seconds, by_node),
        }
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    show(figures)
    wrong = any(run["lost"] or run["twice"] or run["too_stale"] or run["torn"] for run in figures.values())
    stiff = args.latency > 0 and any(float(str(run["follows"])) < FOLLOWS for run in figures.values())
    return int(wrong or stiff)


def show(figures: dict[str, dict[str, object]]) -> None:
    table = Table("run", "actors", "reached (s)", "tokens/s", "groups/s")
    for name, run in figures.items():
        phases = run["phases"]
        assert isinstance(phases, list)
        for phase in phases:
            values = (phase[key] for key in ("actors", "reached_s", "tokens_per_s", "groups_per_s"))
            table.add_row(name, *map(str, values))
    console = Console()
    console.print(table)
    for name, run in figures.items():
        console.print(name, {key: value for key, value in run.items() if key != "phases"})


if __name__ == "__main__":
    sys.exit(main())
