"""Kills in every phase of the turns that learner and actor take on one card (`rollout.share_gpus: turns`).

    python -m tests.chaos.turns [--out runs/turns] [--recover 300] [--only PHASE…] [--brief]

The run's card is watched in Redis. When its holder enters the next phase of the schedule, `kill -9` hits the actor, its
engine, the learner's rank, or the learner's own process, which takes Redis along and is started again with `--resume`.
Writes `summary.json` and prints it as a table. Exit code 1 when a group was lost, trained on twice, too old or torn, or
when the run did not go on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from anchorage.cli.attach import attach
from services.buffer import Buffer
from services.errors import AnchorageError
from tests.chaos.history import given_up, judge
from tests.chaos.scene import Run, RunEnded, command, kill, wait_for

VICTIMS = ("actor", "engine", "rank", "trainer")
PHASES = ("reloading", "updating", "publishing", "saving", "parking", "waking", "playing", "actor parking", "starting")
"""Of the learner, then of the actor. `starting` is the actor's: it comes with each replacement."""
PER_UPDATE, MAX_STALENESS = 2, 1
START_S = 900.0
RECIPE = [
    "configs/demo.yaml",
    "run.minutes=null",
    "rollout.share_gpus=turns",
    "rollout.actors=1",
    "rollout.lease_s=5",
    "rollout.episodes_in_flight=16",
    "rollout.kv_cache_mib=64",
    f"learner.groups_per_update={PER_UPDATE}",
    "learner.group_size=4",
    f"learner.max_staleness={MAX_STALENESS}",
    "learner.zero_stage=2",
    "learner.max_restarts=100",
    "checkpoint.every=2",
    "env.max_steps=12",
    "evaluation.every=null",
]


class Watch:
    """Follows who has the card of a run, over the deaths of its Redis."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._buffer: Buffer | None = None

    def phase(self) -> str:
        """What the holder of the card does; empty if it is free or Redis is away."""
        try:
            if self._buffer is None:
                _, self._buffer = attach(self._run.name, self._run.runs)
            state = self._buffer.card.state()
        except AnchorageError:
            self.close()
            return ""
        if state is None:
            return ""
        return "actor parking" if state.phase == "parking" and state.holder != "learner" else state.phase

    def await_phase(self, wanted: str, seconds: float) -> None:
        """Return as soon as the phase begins. TimeoutError, RunEnded as `wait_for`."""
        deadline = time.monotonic() + seconds
        looked = 0.0
        while self.phase() != wanted:
            if time.monotonic() - looked > 1.0:
                looked = time.monotonic()
                if not self._run.keep_running():
                    raise RunEnded
            if time.monotonic() > deadline:
                raise TimeoutError(f"no phase {wanted} within {seconds:g} s")
            if self._buffer is None:
                time.sleep(0.2)

    def close(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            buffer.close()


def found(run: Run, kind: str) -> list[psutil.Process]:
    """Living processes of a kind, whatever they do at the moment."""
    if kind == "actor":
        return [p for p in psutil.Process().children(recursive=True) if command(p).startswith("ray::RolloutProcess")]
    return run.processes(kind)


BRIEF = dict(
    zip(PHASES, ("rank", "engine", "actor", "rank", "rank", "engine", "trainer", "actor", "engine"), strict=True)
)
"""A victim for each phase."""


def schedule(only: Sequence[str], *, brief: bool) -> list[tuple[str, str]]:
    """(phase, victim), each pair once. An actor's start follows a kill that brings a new actor."""
    if brief:
        return [(phase, victim) for phase, victim in BRIEF.items() if not only or phase in only]
    pairs = [(phase, victim) for phase in PHASES[:-1] for victim in VICTIMS]
    starts = [("starting", victim) for victim in VICTIMS]
    ordered: list[tuple[str, str]] = []
    for pair in pairs:
        ordered.append(pair)
        if pair[1] in ("actor", "trainer") and starts:
            ordered.append(starts.pop(0))
    return [pair for pair in ordered if not only or pair[0] in only]


def strike(run: Run, watch: Watch, phase: str, victim: str, recover_s: float) -> dict[str, Any]:
    """Kill the victim in the phase, and wait until the run makes an update beyond."""
    began = time.monotonic()
    while True:
        watch.await_phase(phase, START_S)
        victims = found(run, victim)
        if victims:
            break
        time.sleep(0.01)  # the phase is that of a holder which is dead: its lease has not ended yet
    target = victims[0]
    before = run.update()
    seen = watch.phase()
    kill(target)
    waited = time.monotonic() - began
    watch.close()
    seconds = wait_for(lambda: run.update() > before and not target.is_running(), recover_s, run)
    return {"phase": phase, "victim": victim, "in_phase": seen == phase, "waited_s": round(waited, 1), "s": seconds}


def storm(run: Run, pairs: Sequence[tuple[str, str]], recover_s: float) -> list[dict[str, Any]]:
    """Let the schedule loose on the run and see it to its end."""
    watch = Watch(run)
    done: list[dict[str, Any]] = []
    wait_for(lambda: run.update() >= 1, START_S, run)
    console = Console(stderr=True)
    try:
        for phase, victim in pairs:
            done.append(strike(run, watch, phase, victim, recover_s))
            console.print(done[-1])
    except RunEnded:
        console.print("the run ended before the schedule: give it more --updates")
    finally:
        watch.close()
    while run.keep_running():
        time.sleep(1.0)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/turns"))
    parser.add_argument("--recover", type=float, default=300.0, help="longest recovery, in seconds")
    parser.add_argument("--updates", type=int, default=None, help="of the run; default: enough for the schedule")
    parser.add_argument("--only", nargs="*", default=[], choices=PHASES, help="phases")
    parser.add_argument("--brief", action="store_true", help="one victim for each phase")
    args = parser.parse_args()
    out: Path = args.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    pairs = schedule(args.only, brief=args.brief)
    updates = args.updates or 4 + 3 * len(pairs)
    began = time.monotonic()
    with Run("turns", out, [*RECIPE, f"learner.updates={updates}"], None) as run:
        kills = storm(run, pairs, args.recover)
    verdict = judge(run.ledger(), given_up([run.output()]), per_update=PER_UPDATE, max_staleness=MAX_STALENESS)
    summary = {**asdict(verdict), "given_up": len(given_up([run.output()])), "updates": run.update(), "kills": kills}
    summary |= {"seconds": round(time.monotonic() - began, 1), "missed": len(pairs) - len(kills)}
    wrong = [f"{name}: {summary[name]}" for name in ("lost", "twice", "too_stale", "torn", "missed") if summary[name]]
    summary["faults"] = wrong if run.update() == updates else [*wrong, f"{run.update()} updates of {updates}"]
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(summary)
    return int(bool(summary["faults"]))


def show(summary: dict[str, Any]) -> None:
    console = Console()
    table = Table("phase", *VICTIMS, title="seconds to the next update after a kill")
    for phase in PHASES:
        row = {kill["victim"]: kill for kill in summary["kills"] if kill["phase"] == phase}
        cells = [f"{row[v]['s']:.1f}{'' if row[v]['in_phase'] else ' *'}" if v in row else "–" for v in VICTIMS]
        table.add_row(phase, *cells)
    console.print(table)
    console.print("* the phase had passed when the kill came")
    facts = Table("figure", "value")
    for name, value in summary.items():
        if name != "kills":
            facts.add_row(name, json.dumps(value))
    console.print(facts)


if __name__ == "__main__":
    sys.exit(main())
