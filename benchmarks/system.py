"""The whole system compared with what its parts achieve alone, as ratios measured in one run.

`python -m benchmarks.system [--json FILE] [--short] [--only PART …]`. The parts:

- `rollout`: tokens per second of an actor, over those of bare vLLM.
- `larger`: the same for a larger policy that plays the same episodes.
- `overlap`: wall time of asynchronous updates, over synchronous ones.
- `buffer`: trajectories through the buffer, over raw Redis commands and over a stream of pickles.
- `weights`: transfer of a version to the actors, over memcpy, its memory, and what it stops: the learner, the actor's
  event loop, requests in flight.
- `agents`: what the gateway for agent programs adds to a call, and tokens per second through it, over those of the
  engine alone.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.engine.vllm import engine_environment
from benchmarks import record
from benchmarks.parts import agents, buffer, overlap, rollout, transfer, weights
from benchmarks.parts.cluster import cluster
from benchmarks.parts.widened import widen
from learner.rank.group import start_ranks
from services.config import load_config
from services.config.tree import Config, WeightsConfig

OBJECT_STORE_BYTES = 5 * 2**30
"""Room for several versions of the largest size."""
PARTS = ("rollout", "larger", "overlap", "buffer", "weights", "agents")
LARGER_WIDTH = 8192
"""Width of the MLPs in the part `larger`: 9.7 M parameters, compared with 0.6 M of the starter policy."""
GOALS = {
    "actor_over_bare": "≥ 0.9",
    "asynchronous_over_synchronous": "≤ 0.6",
    "store_read_over_raw": "≥ 0.7",
    "verified_over_memcpy": "≥ 0.25",
    "loaded_over_memcpy": "≥ 0.1",
    "learner_idle_share": "≤ 0.1",
    "event_loop_stall_s": "≤ 0.05",
    "extra_memory_over_model": "≤ 1.3",
    "cpu_ms_per_call": "≤ 1.5",
    "added_ms_p99": "≤ 20",
    "raw_over_direct": "≥ 0.9",
}


def rollout_config(folder: Path, name: str, *overrides: str) -> Config:
    own = [f"run.dir={folder}", f"run.name={name}", "weights.channel=directory", "env.max_steps=20"]
    return load_config(Path("configs/demo.yaml"), [*own, *overrides])


async def engine_parts(folder: Path, short: bool, wanted: list[str]) -> dict[str, Any]:
    """Measure the parts that need an engine, all on the same engine."""
    config = rollout_config(folder, "rollout")
    found, engine = await rollout.measure(config, groups=24 if short else 48, rounds=1 if short else 3)
    figures: dict[str, Any] = {"rollout": found} if "rollout" in wanted else {}
    try:
        if "weights" in wanted:
            with cluster(object_store=OBJECT_STORE_BYTES):
                ranks = start_ranks(config)
                figures["update"] = await weights.to_first_token(engine, folder, ranks, 5 if short else 20)
                ranks.stop()
    finally:
        await engine.end()
    return figures


async def larger_rollout(folder: Path, short: bool) -> dict[str, float]:
    """Return the figures of `rollout` for a policy that plays the same but costs more computation."""
    model = folder / "larger-policy"
    parameters = widen(rollout_config(folder, "larger").model.path, model, LARGER_WIDTH)
    config = rollout_config(folder, "larger", f"model.path={model}")
    found, engine = await rollout.measure(config, groups=24, rounds=1 if short else 3)
    await engine.end()
    return {"parameters": parameters, **found}


def broadcasts(folder: Path, short: bool) -> list[dict[str, object]]:
    """Measure every combination of channel, size and number of readers."""
    sizes = (1, 16, 128) if short else (1, 16, 128, 1024)
    channels = (WeightsConfig(channel="ray"), WeightsConfig(channel="directory"))
    with cluster(object_store=OBJECT_STORE_BYTES):
        return [
            weights.broadcast(config, folder / f"{config.channel}-{mib}-{readers}", mib, readers)
            for config in channels
            for mib in sizes
            for readers in (1, 3)
        ]


def transferred(folder: Path, short: bool) -> dict[str, float]:
    """Return the figures of a large version's way from a rank to an engine."""
    model = folder / "transferred-policy"
    nbytes = transfer.write_model(rollout_config(folder, "transfer").model.path, model)
    overrides = [f"model.path={model}", "model.dtype=bfloat16", "model.max_prompt_tokens=52", "rollout.kv_cache_mib=64"]
    config = rollout_config(folder, "transfer", *overrides)
    with cluster(object_store=OBJECT_STORE_BYTES):
        ranks = start_ranks(config)
        try:
            return asyncio.run(transfer.measure(config, ranks, nbytes, 3 if short else 9))
        finally:
            ranks.stop()


def measure(folder: Path, short: bool, wanted: list[str]) -> dict[str, Any]:
    figures: dict[str, Any] = {"machine": record.machine()}
    if "buffer" in wanted:
        figures["buffer"] = buffer.measure(folder, groups=8 if short else 32)
    if "weights" in wanted:
        figures["transfer"] = transferred(folder, short)
        figures["broadcast"] = broadcasts(folder, short)
    if {"rollout", "weights"} & set(wanted):
        figures |= asyncio.run(engine_parts(folder, short, wanted))
    if "larger" in wanted:
        figures["larger"] = asyncio.run(larger_rollout(folder, short))
    if "overlap" in wanted:
        overrides = ["learner.groups_per_update=4", "learner.group_size=4"] if short else []
        figures["overlap"] = overlap.measure(folder, 6 if short else 14, overrides)
    if "agents" in wanted:
        figures["agents"] = agents.measure(folder, short)
    return figures


def show(figures: dict[str, Any]) -> None:
    console = Console()
    table = Table("part", "figure", "value", "goal")
    for part in ("rollout", "larger", "overlap", "buffer", "transfer", "update", "agents"):
        for name, value in figures.get(part, {}).items():
            table.add_row(part, name, f"{value:,.3f}", GOALS.get(name, ""))
    console.print(table)
    if "broadcast" in figures:
        sent = Table(*figures["broadcast"][0])
        for row in figures["broadcast"]:
            sent.add_row(*(value if isinstance(value, str) else f"{value:,.2f}" for value in row.values()))
        console.print(sent)


def main() -> None:
    parser = record.parser("Measure the whole system compared with its parts.")
    parser.add_argument("--short", action="store_true", help="take a few minutes only, with less exact figures")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help="parts to measure: " + ", ".join(PARTS),
    )
    options = parser.parse_args()
    os.environ.update(engine_environment())
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.short, options.only)
    show(figures)
    record.keep(figures, options.json)


if __name__ == "__main__":
    main()
