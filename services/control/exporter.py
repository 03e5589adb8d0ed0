"""Prometheus metrics of all live runs, of their Redis servers, and of the control plane itself.

The learner and the rollout actors open no port: Ray places them on any node, and their figures are in Redis already
(heartbeats, metrics stream). Redis has no HTTP, so its statistics are exported here too. Environment servers export
theirs at `/metrics`.

Invariants
- Labels come from small sets: runs of the folder, live actors, kinds of streams. A run that is not live exports only
  `run_live` 0. Of a run with more than `MOST_ACTORS` actors there are only sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.control.live import Snapshot
from services.control.runs import Run
from services.schemas import TRAIN_STREAM

ACTOR_FACTS = {
    "version": "Policy version that the actor samples with.",
    "episodes": "Episodes in flight.",
    "tokens_per_s": "Response tokens a second.",
    "kv_use": "Used share of the KV cache.",
    "stored": "Episodes stored since the actor's start.",
    "failed": "Episodes failed since the actor's start.",
    "abandoned": "Episodes abandoned since the actor's start.",
    "response_tokens": "Response tokens since the actor's start.",
    "updates": "Weight updates since the actor's start.",
}


MOST_ACTORS = 200
NOT_SUMMED = ("version", "kv_use")

REDIS_FACTS = {
    "used_bytes": "Memory in use.",
    "max_bytes": "Memory limit; 0: none.",
    "clients": "Connections.",
    "aof_enabled": "1 if an append-only file is written.",
    "aof_healthy": "1 if the last write and the last rewrite of the append-only file succeeded.",
    "aof_bytes": "Size of the append-only file.",
}


def page(runs: Sequence[Run]) -> bytes:
    """The metrics of all runs in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Runs(runs))
    return generate_latest(registry)


class _Runs(Collector):
    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily] = {}

        def add(name: str, help_text: str, value: Any, **labels: str) -> None:
            if isinstance(value, int | float):
                if name not in families:
                    families[name] = GaugeMetricFamily(f"anchorage_{name}", help_text, labels=list(labels))
                families[name].add_metric(list(labels.values()), float(value))

        for run in self._runs:
            snapshot = run.snapshot()
            add("run_live", "1 if the run's Redis responds.", float(snapshot is not None), run=run.name)
            if snapshot is not None:
                _add_buffer(add, run.name, snapshot)
                _add_actors(add, run.name, snapshot)
                _add_newest(add, run)
                _add_redis(add, run)
        yield from families.values()


def _add_buffer(add: Any, run: str, snapshot: Snapshot) -> None:
    stats = snapshot.stats
    add("run_paused", "1 while the run is paused.", float(snapshot.state == "paused"), run=run)
    for state, count in (("queued", stats.queued), ("leased", stats.leased)):
        add("buffer_tickets", "Tickets by state.", count, run=run, state=state)
    groups: dict[tuple[str, str], int] = {}
    for stream, counts in stats.streams.items():
        kind = "train" if stream == TRAIN_STREAM else "evaluation"
        for state in ("open", "complete", "cancelled"):
            groups[kind, state] = groups.get((kind, state), 0) + getattr(counts, state)
    for (kind, state), count in groups.items():
        add("buffer_groups", "Groups in Redis by kind of stream and state.", count, run=run, stream=kind, state=state)
    add("buffer_bytes", "Bytes of stored trajectories.", stats.trajectory_bytes, run=run)
    add("buffer_cap_bytes", "Limit in bytes; above it no new group starts.", stats.cap_bytes, run=run)


def _add_actors(add: Any, run: str, snapshot: Snapshot) -> None:
    beats = snapshot.actors
    add("actors", "Live rollout actors.", len(beats), run=run)
    for name in ACTOR_FACTS.keys() - NOT_SUMMED:
        values = [value for beat in beats.values() if isinstance(value := beat.facts.get(name), int | float)]
        add(f"actors_{name}", f"Sum over the live actors. {ACTOR_FACTS[name]}", sum(values), run=run)
    add(
        "actors_heard_seconds",
        "Age of the oldest heartbeat.",
        max((b.heard_s for b in beats.values()), default=0),
        run=run,
    )
    for actor, beat in beats.items() if len(beats) <= MOST_ACTORS else ():
        add("actor_heard_seconds", "Seconds since the actor's last heartbeat.", beat.heard_s, run=run, actor=actor)
        for name, help_text in ACTOR_FACTS.items():
            add(f"actor_{name}", help_text, beat.facts.get(name), run=run, actor=actor)


def _add_redis(add: Any, run: Run) -> None:
    stats = run.live.server() if run.live is not None else None
    for name, help_text in REDIS_FACTS.items() if stats is not None else ():
        add(f"redis_{name}", f"Of the run's Redis: {help_text}", getattr(stats, name), run=run.name)


def _add_newest(add: Any, run: Run) -> None:
    """The newest value of every metric that the learner records."""
    newest: dict[str, Any] = {}
    for record in run.metrics.records()[-200:]:
        newest.update(record)
    add("run_update", "Completed updates.", newest.pop("step", None), run=run.name)
    add("run_newest_record_seconds", "Unix time of the newest record.", newest.pop("time", None), run=run.name)
    for name, value in newest.items():
        add(f"learner_{re.sub('[^a-zA-Z0-9_]', '_', name)}", f"{name} of the newest update.", value, run=run.name)
