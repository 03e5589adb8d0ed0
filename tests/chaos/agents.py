"""The chaos run of agent programs: `kill -9` of agents, actor, engine, environment server and Redis, with 32 episodes
in flight.

    python -m tests.chaos.agents [--kills 3] [--brief] [--seed 0] [--out runs/chaos-agents] [--recover 180]

The policy is a tiny random one, since what is checked is the history: groups that were lost, trained on twice, too old
or torn; processes of agents, and what those have started, that are alive five seconds after their actor; seconds until
episodes are played again. Writes `summary.json` and prints it as a table. Exit code 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from tests.chaos.history import given_up, judge
from tests.chaos.scene import ROOT, Run, RunEnded, command, descendants, kill, wait_for
from tests.integration.test_agents import recipe

KINDS = ("agent", "actor", "engine", "environment", "redis")
IN_FLIGHT = 32
PER_UPDATE, MAX_STALENESS = 8, 1
"""So many groups of four that `IN_FLIGHT` episodes can be played while an update's groups wait to be complete."""
START_S = 1200.0
OUTLIVE_S = 5.0
LOOK_S = 0.02
OVERRIDES = [
    f"learner.groups_per_update={PER_UPDATE}",
    f"learner.max_staleness={MAX_STALENESS}",
    f"rollout.episodes_in_flight={IN_FLIGHT}",
    "rollout.lease_s=5",
    "checkpoint.every=3",
    "evaluation.every=null",
    "learner.max_restarts=100",
    "agent.preload=[]",
    "telemetry.log_level=INFO",
]
Started = dict[int, psutil.Process]
"""Processes by their ids. psutil also compares their times of creation, so that a reused id is another process."""


class Agents:
    """The processes of agents of a run, and those that they have started."""

    def __init__(self) -> None:
        self._seen: Started = {}

    def alive(self) -> Started:
        """The main processes of the agents. Remembers them, what forks them, and what they have started, for `left`."""
        return self.look()[0]

    def look(self) -> tuple[Started, Started]:
        """The main processes of the agents, and those with what forks them and what they have started."""
        found = {one.pid: one for one in descendants(psutil.Process())}
        parents = {pid: parent(one) for pid, one in found.items()}
        # An agent is forked, so it has the command line of what forked it; the forker's own parent is the actor.
        forkers = {pid for pid, one in found.items() if "zygote.py" in command(one)}
        family = {pid: one for pid, one in found.items() if _is_below(pid, forkers, parents)}
        self._seen |= family
        return {pid: found[pid] for pid in forkers if parents[pid] in forkers}, family

    def left(self) -> list[psutil.Process]:
        """Those ever seen that still run."""
        return [one for one in self._seen.values() if lives(one)]


def _is_below(pid: int, above: Container[int], parents: Mapping[int, int]) -> bool:
    """Whether a process or one that it descends from is among `above`."""
    while pid not in above and pid in parents:
        pid = parents[pid]
    return pid in above


def parent(process: psutil.Process) -> int:
    try:
        return int(process.ppid())
    except psutil.NoSuchProcess:
        return -1


def lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def gone_after(processes: Sequence[psutil.Process], limit_s: float) -> float | None:
    """Seconds until all of these have ended; None if one has not within the limit."""
    began = time.monotonic()
    while any(lives(one) for one in processes):
        if time.monotonic() - began > limit_s:
            return None
        time.sleep(LOOK_S)
    return time.monotonic() - began


def stored(run: Run) -> int:
    """Episodes that living actors have stored."""
    return sum(int(str(facts["stored"])) for facts in run.playing().values())


def full(agents: Agents, run: Run) -> tuple[Started, Started]:
    """Wait until `IN_FLIGHT` agents play; they, and all processes of theirs."""
    seen: list[tuple[Started, Started]] = []

    def is_full() -> bool:
        seen[:] = [agents.look()]
        return len(seen[0][0]) >= IN_FLIGHT

    wait_for(is_full, START_S, run)
    return seen[0]


def strike(kind: str, run: Run, agents: Agents, draw: random.Random, recover_s: float) -> dict[str, Any]:
    """Kill one part while `IN_FLIGHT` episodes are played, and wait until one that began afterwards is stored."""
    wait_for(lambda: bool(run.playing()), START_S, run)
    flight, family = full(agents, run)
    gone: dict[str, float | None] = {}
    before, [actor] = run.playing().keys(), run.processes("actor")
    began = time.monotonic()
    if kind == "agent":
        victim = draw.choice([*flight.values()])
        helpers = descendants(victim)
        kill(victim)
        gone = {"agents_gone_s": gone_after([victim, *helpers], OUTLIVE_S)}
        back: Callable[[], bool] = lambda: True  # noqa: E731 - the others play on
    elif kind in ("actor", "engine"):
        [victim] = [actor] if kind == "actor" else run.processes("engine")
        kill(victim)
        ended = gone_after([actor], recover_s)  # each ends the other
        gone = {"agents_gone_s": None if ended is None else gone_after([*family.values()], OUTLIVE_S)}
        back = lambda: bool(run.playing().keys() - before)  # noqa: E731
    else:
        victim = run.processes(kind)[0]
        kill(victim)
        asks = run.environment_answers if kind == "environment" else lambda: bool(run.ask(lambda one: one.state()))
        back = lambda: not lives(victim) and asks()  # noqa: E731
    wait_for(back, recover_s, run)
    wait_for(lambda: bool(agents.alive().keys() - flight.keys()), recover_s, run)
    count = stored(run)
    wait_for(lambda: stored(run) > count, recover_s, run)
    return {"kind": kind, "in_flight": len(flight), "s": round(time.monotonic() - began, 1), **gone}


def storm(run: Run, agents: Agents, kinds: Sequence[str], seed: int, recover_s: float) -> list[dict[str, Any]]:
    """Kill each of `kinds` in turn, each in another update, and see the run to its end."""
    draw = random.Random(seed)
    kills: list[dict[str, Any]] = []
    wait_for(lambda: run.update() >= 1, START_S, run)
    console = Console(stderr=True)
    try:
        for kind in kinds:
            update = run.update()
            time.sleep(draw.uniform(0.0, 1.0))  # anywhere in an episode
            kills.append(strike(kind, run, agents, draw, recover_s) | {"update": update})
            console.print(kills[-1])
            wait_for(lambda update=update: run.update() > update, START_S, run)  # type: ignore[misc]
    except RunEnded:
        console.print("the run ended before the schedule: give it more --updates")
    while run.keep_running():
        agents.look()
        time.sleep(1.0)
    return kills


def faults(summary: dict[str, Any], kinds: Sequence[str], updates: int) -> list[str]:
    """What is wrong with the run, in words."""
    names = ("lost", "twice", "too_stale", "torn", "given_up", "left_running")
    found = [f"{name}: {summary[name]}" for name in names if summary[name]]
    if len(summary["kills"]) != len(kinds):
        found.append(f"{len(summary['kills'])} kills of {len(kinds)}")
    if summary["updates"] != updates:
        found.append(f"{summary['updates']} updates of {updates}")
    late = [kill["kind"] for kill in summary["kills"] if kill.get("agents_gone_s", 0.0) is None]
    return [*found, f"agent processes outlived by more than {OUTLIVE_S:g} s: {', '.join(late)}"] if late else found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="of each kind")
    parser.add_argument("--brief", action="store_true", help="one kill of each kind")
    parser.add_argument("--updates", type=int, default=None, help="of the run; default: enough for the schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recover", type=float, default=180.0, help="longest recovery, in seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos-agents"))
    args = parser.parse_args()
    out: Path = args.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    kinds = [kind for kind in KINDS for _ in range(1 if args.brief else args.kills)]
    random.Random(args.seed).shuffle(kinds)
    updates = args.updates or 3 + 3 * len(kinds)
    file = recipe(out, str(ROOT / "tests" / "chaos" / "light_agent.py"))
    agents = Agents()
    began = time.monotonic()
    with Run("chaos", out, [str(file), *OVERRIDES, f"learner.updates={updates}"], None) as run:
        kills = storm(run, agents, kinds, args.seed, args.recover)
    gone_after(agents.left(), OUTLIVE_S)
    abandoned = given_up([run.output()])
    summary: dict[str, Any] = {
        **asdict(judge(run.ledger(), abandoned, per_update=PER_UPDATE, max_staleness=MAX_STALENESS)),
        "given_up": len(abandoned),
        "left_running": len(agents.left()),
        "updates": run.update(),
        "seconds": round(time.monotonic() - began, 1),
        "kills": kills,
    }
    summary["faults"] = faults(summary, kinds, updates)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(summary)
    return int(bool(summary["faults"]))


def show(summary: dict[str, Any]) -> None:
    console = Console()
    table = Table("killed", "times", "in flight", "playing again (s)", "its agents gone (s)")
    for kind in KINDS:
        kills = [one for one in summary["kills"] if one["kind"] == kind]
        names = ("in_flight", "s", "agents_gone_s")
        cells = [", ".join(f"{one[name]:.3g}" for one in kills if one.get(name) is not None) for name in names]
        table.add_row(kind, str(len(kills)), *cells)
    console.print(table)
    facts = Table("figure", "value")
    for name, value in summary.items():
        if name != "kills":
            facts.add_row(name, json.dumps(value))
    console.print(facts)


if __name__ == "__main__":
    sys.exit(main())
