"""What takes two cards: NCCL, two ranks of the learner, two workers of an engine. On CPUs two processes each."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.gpu_check.engine import DRY_GAP, GAP, TEMPERATURE, Engine, gap
from benchmarks.gpu_check.models import folder_of
from benchmarks.gpu_check.rows import Row, at_most, failed, holds, measured, skipped
from benchmarks.gpu_check.settings import Settings, cards
from benchmarks.parts import updates
from benchmarks.parts.cluster import cluster
from learner.prepare import prepare
from learner.rank.group import start_ranks
from services import process
from services.config.tree import Config

WORLD = 2
PATIENCE_S = 180.0
RELATIVE, LEAST_LOSS = 0.02, 0.05
"""Largest relative difference between the figures of one rank's update and those of two."""


def lacking(name: str, settings: Settings) -> Iterator[Row]:
    if not settings.dry and cards() < WORLD:
        yield skipped(name, f"needs two cards, there are {cards()}")


def all_reduce(settings: Settings) -> Iterator[Row]:
    """A sum over two processes: NCCL's on cards, Gloo's on CPUs."""
    yield from (missing := [*lacking("NCCL all-reduce", settings)])
    if not missing:
        library = "Gloo" if settings.dry else "NCCL"
        yield from judge_sums(library, _sums(settings.device, 1 if settings.dry else 256))


def _sums(device: str, mib: int) -> list[Mapping[str, Any] | str]:
    """What each process printed: its figures, or its last line where it failed."""
    found: list[Mapping[str, Any] | str] = []
    with process.ReservedPort("127.0.0.1") as port, tempfile.TemporaryDirectory() as folder:
        members = []
        for rank in range(WORLD):
            output = open(f"{folder}/{rank}", "w+b")  # noqa: SIM115 - read below, when the process has ended
            command = [sys.executable, "-m", "benchmarks.gpu_check.all_reduce", str(rank), str(WORLD)]
            command += [str(port.number), device, str(mib)]
            members.append((process.start(command, output=output), output))
        deadline = time.monotonic() + PATIENCE_S
        for member, output in members:
            try:
                member.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                member.kill()
                member.wait()
            with output:
                output.seek(0)
                lines = output.read().decode(errors="replace").strip().splitlines() or ["it printed nothing"]
            found.append(json.loads(lines[-1]) if member.returncode == 0 else lines[-1][:300])
    return found


def judge_sums(library: str, found: Sequence[Mapping[str, Any] | str]) -> Iterator[Row]:
    """Judge what the processes printed."""
    for rank, figures in enumerate(found):
        name = f"{library} all-reduce, rank {rank}, wrong numbers"
        if isinstance(figures, str):
            yield failed(name, figures)
        else:
            yield holds(name, figures["wrong"], figures["wrong"] == 0, "0")
    rates = [figures["gb_s"] for figures in found if not isinstance(figures, str)]
    if rates:
        yield measured(f"{library} all-reduce, GB/s", min(rates))


def two_ranks(settings: Settings) -> Iterator[Row]:
    """An update of two ranks in ZeRO stage 3, beside that of one rank in stage 2 on the same rows."""
    name = "two ranks"
    yield from (missing := [*lacking(name, settings)])
    if not missing:
        with cluster(learners=WORLD):
            one, two = (_update(settings, ranks, stage) for ranks, stage in ((1, 2), (WORLD, 3)))
        yield from judge_ranks(one, two)


def _update(settings: Settings, count: int, stage: int) -> dict[str, float]:
    """The figures of an update."""
    tree: dict[str, Any] = {
        "model": {"path": folder_of(settings), "dtype": "bfloat16"},
        "learner": {"ranks": count, "zero_stage": stage, "microbatch_tokens": 1024 if settings.dry else 8192},
        "loss": {"kl_coef": 0.0, "importance_cap": None},
    }
    config = Config.model_validate(tree)
    groups = updates.made_up_groups(
        1 if settings.dry else 4, np.random.default_rng(0), 1127, prompt=(40, 80), response=(5, 20), steps=(2, 5)
    )
    ranks = start_ranks(config)
    try:
        return ranks.update(prepare(groups, config, 0, ranks.sharing).work)
    finally:
        ranks.stop()


def judge_ranks(one: Mapping[str, float], two: Mapping[str, float]) -> Iterator[Row]:
    """Compare loss and gradient of the two updates."""
    # Advantages of both signs nearly cancel in the loss: a smaller one is compared with `LEAST_LOSS`.
    for figure, least in (("loss", LEAST_LOSS), ("grad_norm", 0.0)):
        off = abs(two[figure] - one[figure]) / max(abs(one[figure]), least)
        yield at_most(f"two ranks against one, {figure}, relative difference", off, RELATIVE)


def tensor_parallel(settings: Settings) -> Iterator[Row]:
    """An engine of two workers: the gap to the learner."""
    name = "two workers of an engine"
    yield from (missing := [*lacking(name, settings)])
    if missing:
        return
    folder = folder_of(settings)
    with Engine(settings, folder, tensor_parallel=WORLD) as engine:
        yield measured(f"{name}: start, s", engine.start())
        samples = engine.sample(DRY_GAP if settings.dry else GAP, temperature=TEMPERATURE)
    for row in gap(settings, folder, samples):
        yield Row(f"{name}: {row.name}", row.value, row.verdict, row.reason)


CHECKS = (all_reduce, two_ranks, tensor_parallel)
