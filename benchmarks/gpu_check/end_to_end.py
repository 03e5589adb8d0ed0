"""Three updates end to end with the starter policy: `anchorage.train`, on cards of their own and on a shared one.

Invariants
- A run counts only if it made all its updates, every figure of the loss is finite, and sampler and learner agree on the
  tokens that the version being updated sampled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import anchorage
from benchmarks.gpu_check.rows import Row, at_most, holds, measured, skipped
from benchmarks.gpu_check.settings import CARD_NEEDED, Settings, cards
from services.errors import AnchorageError

UPDATES = 3
GAP = {"float32": 1e-3, "bfloat16": 0.05}
"""Nats: mean difference between sampler and learner by `model.dtype`; above, a run warns."""
SHARES = {"true": "one shared card", "turns": "one card in turns"}
"""Values of `rollout.share_gpus`; those that the configuration does not know are left out."""


def on_cards_of_their_own(settings: Settings) -> Iterator[Row]:
    name = "learner and actor apart"
    if not settings.dry and cards() < 2:
        yield skipped(name, f"needs two cards, there are {cards()}")
        return
    yield from trained(settings, name, [])


def on_a_shared_card(settings: Settings) -> Iterator[Row]:
    for value, name in SHARES.items():
        overrides = [f"rollout.share_gpus={value}", "rollout.gpu_memory_utilization=0.3"]
        if not _known(overrides):
            continue
        if settings.dry:
            yield skipped(name, "there is no card to share")
        elif not cards():
            yield skipped(name, CARD_NEEDED)
        else:
            yield from trained(settings, name, overrides)


def trained(settings: Settings, name: str, overrides: Sequence[str]) -> Iterator[Row]:
    """Train, and judge what the run recorded."""
    size = ["learner.groups_per_update=2", "learner.group_size=4"] if settings.dry else ["learner.groups_per_update=8"]
    config = anchorage.load_config(
        "demo",
        f"run.dir={settings.folder}",
        f"run.name={name.replace(' ', '-')}",
        f"learner.updates={UPDATES}",
        f"model.dtype={settings.dtype}",
        "run.minutes=null",
        "evaluation.every=null",
        "learner.max_staleness=1",
        "env.max_steps=8",
        "telemetry.trackers=[]",
        *size,
        *overrides,
    )
    began = time.monotonic()
    run = anchorage.train(config)
    records = [record for record in run.metrics() if "rollout/success_rate" in record]
    yield measured(f"{name}: run, s", time.monotonic() - began)
    yield from judge(name, records, settings.dtype)


def judge(name: str, records: Sequence[Mapping[str, Any]], dtype: str) -> Iterator[Row]:
    """Judge the records of a run's updates (`metrics.jsonl`)."""
    count = len({record["step"] for record in records})
    yield holds(f"{name}: updates", count, count == UPDATES, f"{UPDATES}")
    lost = [key for record in records for key, value in record.items() if not math.isfinite(value)]
    yield holds(f"{name}: figures that are not finite", len(lost), not lost, ", ".join(sorted(set(lost))) or "0")
    gaps = [record["loss/fresh_gap"] for record in records if "loss/fresh_gap" in record]
    # Without a token of the version that is being updated nothing was compared.
    yield at_most(f"{name}: sampler and learner apart, mean, nats", max(gaps, default=math.inf), GAP[dtype])
    for part in ("wait", "prepare", "update", "publish"):
        taken = [record[f"time/{part}_s"] for record in records[1:] if f"time/{part}_s" in record]
        if taken:
            yield measured(f"{name}: {part}, s an update", sum(taken) / len(taken))


def _known(overrides: Sequence[str]) -> bool:
    try:
        anchorage.load_config("demo", *overrides)
    except AnchorageError:
        return False
    return True


CHECKS = (on_cards_of_their_own, on_a_shared_card)
