"""Wall time of an update, asynchronous and synchronous, and the fraction of the ideal max(rollout, update).

Two short runs of `anchorage train` on the same recipe, with `max_staleness` 1 and 0. In the synchronous run nothing
overlaps, so that its waiting time is the rollout time, and the rest is the update time. The ideal assumes one core for
each; `processors_of_two_processes` measures how much of that the machine provides.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.parts import processors

WARM = 2
START_S, UPDATE_S = 300.0, 60.0
"""Time limits of a run's start and of an update, in seconds; a run that exceeds them is considered hung."""
PARTS = ("time/prepare_s", "time/update_s", "time/publish_s")


def run(folder: Path, name: str, staleness: int, updates: int, overrides: Sequence[str]) -> list[dict[str, float]]:
    """Return the metrics of a run's updates, without those of the warm-up."""
    command = [sys.executable, "-m", "anchorage.cli.main", "train", "configs/demo.yaml", *overrides]
    own = [f"run.dir={folder}", f"run.name={name}", f"learner.max_staleness={staleness}", f"learner.updates={updates}"]
    subprocess.run(
        [*command, *own, "run.minutes=null", "evaluation.every=null"],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=START_S + updates * UPDATE_S,
    )
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][WARM:]


def measure(folder: Path, updates: int, overrides: Sequence[str] = ()) -> dict[str, float]:
    overlapped = run(folder, "asynchronous", 1, updates, overrides)
    in_turn = run(folder, "synchronous", 0, updates, overrides)
    rollout = fmean(record["time/wait_s"] for record in in_turn)
    update = fmean(sum(record[part] for part in PARTS) for record in in_turn)
    seconds = fmean(record["time/wait_s"] + sum(record[part] for part in PARTS) for record in overlapped)
    return {
        "updates": len(in_turn),
        "rollout_s": rollout,
        "update_s": update,
        "synchronous_s": rollout + update,
        "asynchronous_s": seconds,
        "asynchronous_over_synchronous": seconds / (rollout + update),
        "fraction_of_ideal": max(rollout, update) / seconds,
        "processors_of_two_processes": processors.measure(),
    }
