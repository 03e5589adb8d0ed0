"""The chaos run: training goes on while every kind of process is killed with `kill -9`, again and again.

    python -m tests.chaos.run [--kills 3] [--updates 100] [--seed 0] [--out runs/chaos] [--recover 180] [--no-calm]

Writes `summary.json` and prints it as tables. Exit code 1 when something was lost, trained on twice or too old, when a
part did not recover, when a process goes on growing, or when the policy is worse than an undisturbed run's.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from tests.chaos.history import given_up, judge
from tests.chaos.scene import ROOT, Nodes, Run, RunEnded, kill, wait_for

KINDS = ("actor", "environment", "learner", "redis", "node")
PER_UPDATE, MAX_STALENESS = 8, 1
START_S = 600.0
WARM_S = 30.0
LONG_S = 90.0
SAMPLE_S = 2.0
LATE_MIB, LATE_DESCRIPTORS = 32.0, 16
"""A process that grows by more in its last third is taken to grow for ever."""
RECIPE = [
    "configs/demo.yaml",
    "run.minutes=null",
    f"learner.groups_per_update={PER_UPDATE}",
    "learner.group_size=4",
    f"learner.max_staleness={MAX_STALENESS}",
    "learner.max_restarts=100",
    "checkpoint.every=3",
    "evaluation.every=null",
    "rollout.lease_s=5",
    "rollout.episodes_in_flight=32",
    "telemetry.log_level=INFO",
]


class Growth:
    """Memory (MiB) and descriptors of each long-lived process, from when it is warm."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], list[tuple[float, float, int]]] = defaultdict(list)
        self._sampled = 0.0

    def sample(self, run: Run) -> None:
        """Look at every process, at most once in `SAMPLE_S`."""
        if time.monotonic() - self._sampled < SAMPLE_S:
            return
        self._sampled = time.monotonic()
        for kind in ("trainer", "rank", "actor", "engine", "environment", "redis"):
            for process in run.processes(kind):
                try:
                    age = time.time() - process.create_time()
                    if age > WARM_S:
                        memory, descriptors = process.memory_info().rss / 2**20, process.num_fds()
                        self._seen[kind, process.pid].append((age, memory, descriptors))
                except psutil.Error:
                    continue

    def figures(self) -> dict[str, dict[str, float]]:
        """By kind, of the process that grew most: growth in all, and late (the last third of its time over the second),
        which is what goes on; late growth of those that lived long enough only."""
        grown: dict[str, dict[str, float]] = {}
        for (kind, _), seen in self._seen.items():
            of_kind = grown.setdefault(kind, dict.fromkeys(("mib", "late_mib", "descriptors", "late_descriptors"), 0.0))
            for place, name in ((1, "mib"), (2, "descriptors")):
                of_kind[name] = max(of_kind[name], round(seen[-1][place] - seen[0][place], 1))
                of_kind[f"late_{name}"] = max(of_kind[f"late_{name}"], round(late(seen, place), 1))
        return grown


def late(seen: Sequence[tuple[float, ...]], place: int) -> float:
    """How much higher the last third is than the second, by their medians, since a large batch makes a peak of memory;
    0 for a process that did not live long."""
    begin, end = seen[0][0], seen[-1][0]
    if end - begin < LONG_S:
        return 0.0
    third = (end - begin) / 3
    second = [sample[place] for sample in seen if begin + third <= sample[0] < end - third]
    last = [sample[place] for sample in seen if sample[0] >= end - third]
    return median(last) - median(second) if second else 0.0


def strike(kind: str, number: int, run: Run, nodes: Nodes, draw: random.Random) -> Callable[[], bool]:
    """Kill one part; answers the question whether it is back."""
    if kind == "node":
        before_it = run.playing().keys()
        nodes.kill()
        nodes.add()
        return lambda: len(run.playing()) == 2 and run.playing().keys() != before_it
    if kind == "actor":  # and its engine's process: each ends the other
        victim = draw.choice(run.processes("actor"))
        [engine] = [process for process in run.processes("engine") if process.ppid() == victim.pid]
        kill(engine if number % 3 == 2 else victim)
        return lambda: len(run.playing()) == 2 and not victim.is_running() and not engine.is_running()
    if kind == "learner":
        [victim] = run.processes("rank" if number % 3 == 2 else "trainer")
        kill(victim)
        before = run.update()
        return lambda: len(run.processes("rank")) == 1 and run.update() > before
    victim = run.processes(kind)[0]
    kill(victim)
    if kind == "redis":
        return lambda: bool(run.ask(lambda buffer: buffer.state()))
    return lambda: run.environment_answers()


def storm(
    run: Run, nodes: Nodes, growth: Growth, *, kills: int, updates: int, seed: int, recover_s: float
) -> dict[str, list[float]]:
    """Let the schedule loose on the run and see it to its end; seconds to recover by kind."""
    draw = random.Random(seed)
    schedule = [(kind, number) for kind in KINDS for number in range(kills)]
    draw.shuffle(schedule)
    last = int(updates * 0.6)
    moments = sorted(draw.sample(range(1, last), len(schedule)))
    recovery: dict[str, list[float]] = defaultdict(list)
    wait_for(lambda: len(run.playing()) == 2 and run.update() >= 1, START_S, run)
    try:
        for moment, (kind, number) in zip(moments, schedule, strict=True):
            wait_for(lambda moment=moment: growth.sample(run) or run.update() >= moment, START_S, run)  # type: ignore[misc]
            wait_for(lambda: len(run.playing()) == 2, START_S, run)
            time.sleep(draw.uniform(0.0, 2.0))
            back = strike(kind, number, run, nodes, draw)
            recovery[kind].append(round(wait_for(back, recover_s, run), 1))
    except RunEnded:
        Console(stderr=True).print("the run ended before the schedule: give it more --updates")
    while run.keep_running():
        growth.sample(run)
        time.sleep(2.0)
    return dict(recovery)


def evaluate(run: Run, updates: int, out: Path) -> tuple[float, list[float]]:
    """Success of the run's last policy on the panel: rate, and its 95 % interval."""
    policy = run.folder / "checkpoints" / f"{updates:06d}" / "policy"
    result = out / f"{run.name}-evaluation.json"
    command = [sys.executable, "-m", "anchorage.cli.main", "eval", *RECIPE, "evaluation.episodes=128"]
    names = [f"run.name={run.name}-eval", f"run.dir={out}"]
    subprocess.run([*command, *names, "--policy", str(policy), "--json", str(result)], cwd=ROOT, check=True)
    [body] = json.loads(result.read_text()).values()
    return body["success"]["rate"], body["success"]["interval_95"]


def faults(summary: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """What is wrong with the run, in words."""
    found = [f"{name}: {summary[name]}" for name in ("lost", "twice", "too_stale", "torn") if summary[name]]
    found += [
        f"{kind} killed {summary['kills'].get(kind, 0)} times"
        for kind in KINDS
        if summary["kills"].get(kind, 0) != args.kills
    ]
    if summary["updates"] != args.updates:
        found.append(f"{summary['updates']} updates of {args.updates}")
    for run, kinds in summary["growth"].items():
        for kind, grown in kinds.items():
            if grown["late_mib"] > LATE_MIB or grown["late_descriptors"] > LATE_DESCRIPTORS:
                found.append(f"{kind} of the {run} run still grows: {grown}")
    if not args.no_calm and summary["success_chaos_interval"][1] < summary["success_calm_interval"][0]:
        found.append("the policy is worse than the undisturbed run's")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="of each kind")
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recover", type=float, default=180.0, help="longest recovery, in seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--no-calm", action="store_true", help="leave out the undisturbed run and the evaluations")
    args = parser.parse_args()
    out: Path = args.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    recipe = [*RECIPE, f"learner.updates={args.updates}"]
    growth = {"chaos": Growth()} if args.no_calm else {"chaos": Growth(), "calm": Growth()}
    nodes = Nodes()
    try:
        nodes.add()
        began = time.monotonic()
        with Run("chaos", out, recipe, nodes.address) as run:
            recovery = storm(
                run,
                nodes,
                growth["chaos"],
                kills=args.kills,
                updates=args.updates,
                seed=args.seed,
                recover_s=args.recover,
            )
        seconds = time.monotonic() - began
        if not args.no_calm:
            with Run("calm", out, recipe, nodes.address) as calm:
                while calm.keep_running():
                    growth["calm"].sample(calm)
                    time.sleep(2.0)
    finally:
        nodes.close()
    verdict = judge(run.ledger(), given_up([run.output()]), per_update=PER_UPDATE, max_staleness=MAX_STALENESS)
    summary: dict[str, Any] = {
        "kills": {kind: len(times) for kind, times in recovery.items()},
        **asdict(verdict),
        "given_up": len(given_up([run.output()])),
        "updates": run.update(),
        "seconds": round(seconds, 1),
        "recovery_s": recovery,
        "growth": {name: seen.figures() for name, seen in growth.items()},
    }
    if not args.no_calm:
        for name, played in (("chaos", run), ("calm", calm)):
            summary[f"success_{name}"], summary[f"success_{name}_interval"] = evaluate(played, args.updates, out)
    summary["faults"] = faults(summary, args)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(summary, recovery)
    return int(bool(summary["faults"]))


def show(summary: dict[str, Any], recovery: dict[str, list[float]]) -> None:
    console = Console()
    table = Table("killed", "times", "recovery (s)", "longest (s)")
    for kind, times in recovery.items():
        table.add_row(kind, str(len(times)), ", ".join(f"{value:.1f}" for value in times), f"{max(times):.1f}")
    console.print(table)
    facts = Table("figure", "value")
    for name, value in summary.items():
        if name not in ("kills", "recovery_s"):
            facts.add_row(name, json.dumps(value))
    console.print(facts)


if __name__ == "__main__":
    sys.exit(main())
