"""The chaos run of agent programs: 32 of their episodes in flight while agents, actor, engine, environment server and
Redis are killed with `kill -9`.

    python -m tests.chaos.agents [--kills 3] [--updates 60] [--seed 0] [--out runs/chaos-agents]

The policy is a tiny random one, since what is checked is the history: groups lost, trained twice or torn; agent
processes that outlive their actor by more than five seconds; seconds until episodes are played again. Writes
`summary.json`; exit code 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.history import given_up, judge
from tests.chaos.scene import ROOT, Run, RunEnded, command, descendants, kill, wait_for
from tests.integration.test_agents import recipe

KINDS = ("agent", "actor", "engine", "environment", "redis")
PER_UPDATE, MAX_STALENESS = 4, 1
START_S = 600.0
OUTLIVE_S = 5.0
RECOVER_S = 180.0


def zygotes() -> list[psutil.Process]:
    """Processes that fork agents, and agents: they have one command line."""
    return [one for one in descendants(psutil.Process()) if "zygote.py" in command(one)]


def agents() -> list[psutil.Process]:
    """The processes of agents: those whose parent is a zygote."""
    found = zygotes()
    pids = {one.pid for one in found}
    return [one for one in found if _parent(one) in pids]


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return -1


def stored(run: Run) -> int:
    """Episodes that living actors have stored."""
    return sum(int(str(facts["stored"])) for facts in run.playing().values())


def strike(kind: str, run: Run, draw: random.Random) -> Callable[[], bool]:
    """Kill one part; returns what holds once episodes are played again."""
    if kind == "agent":
        before = stored(run)
        kill(draw.choice(agents()))
        return lambda: stored(run) > before
    if kind in ("actor", "engine"):
        old = [one.pid for one in zygotes()]
        names = run.playing().keys()
        kill(run.processes(kind)[0])
        until_gone(old)
        return lambda: bool(run.playing()) and not (run.playing().keys() & names) and stored(run) > 0
    before, began = run.update(), stored(run)
    kill(run.processes(kind)[0])
    return lambda: run.update() > before or stored(run) > began


def until_gone(pids: list[int]) -> None:
    """Wait until these processes have ended. Raises RuntimeError if one outlives its actor."""
    began = time.monotonic()
    while left := [pid for pid in pids if _lives(pid)]:
        if time.monotonic() - began > OUTLIVE_S:
            raise RuntimeError(f"{len(left)} agent processes outlive their actor by {OUTLIVE_S:g} s")
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def storm(run: Run, kills: int, updates: int, seed: int) -> dict[str, list[float]]:
    """Kill each kind `kills` times; returns seconds to recover, by kind."""
    draw = random.Random(seed)
    schedule = [kind for kind in KINDS for _ in range(kills)]
    draw.shuffle(schedule)
    moments = sorted(draw.sample(range(1, int(updates * 0.7)), len(schedule)))
    recovery: dict[str, list[float]] = defaultdict(list)
    try:
        for moment, kind in zip(moments, schedule, strict=True):
            wait_for(lambda moment=moment: run.update() >= moment and bool(agents()), START_S, run)  # type: ignore[misc]
            time.sleep(draw.uniform(0.0, 1.0))
            wait_for(lambda: bool(run.playing()) and bool(agents()), START_S, run)
            recovery[kind].append(round(wait_for(strike(kind, run, draw), RECOVER_S, run), 1))
    except RunEnded:
        print("the run ended before the schedule: give it more --updates", file=sys.stderr)
    while run.keep_running():
        time.sleep(1.0)
    return dict(recovery)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="of each kind")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos-agents"))
    args = parser.parse_args()
    out: Path = args.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    overrides = [
        str(recipe(out, str(ROOT / "examples" / "agents" / "react.py"))),
        f"learner.updates={args.updates}",
        f"learner.groups_per_update={PER_UPDATE}",
        f"learner.max_staleness={MAX_STALENESS}",
        "rollout.episodes_in_flight=32",
        "rollout.lease_s=5",
        "checkpoint.every=3",
        "learner.max_restarts=100",
        "telemetry.log_level=INFO",
    ]
    with Run("chaos", out, overrides, None) as run:
        recovery = storm(run, args.kills, args.updates, args.seed)
    abandoned = given_up([run.output()])
    verdict = judge(run.ledger(), abandoned, per_update=PER_UPDATE, max_staleness=MAX_STALENESS)
    summary: dict[str, Any] = {
        "recovery_s": recovery,
        **asdict(verdict),
        "given_up": len(abandoned),
        "updates": run.update(),
        "agents_left": len(zygotes()),
    }
    wrong = [name for name in ("lost", "twice", "too_stale", "torn", "agents_left") if summary[name]]
    wrong += [kind for kind in KINDS if len(recovery.get(kind, ())) != args.kills]
    summary["wrong"] = wrong if run.update() == args.updates else [*wrong, "updates"]
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    return int(bool(summary["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
