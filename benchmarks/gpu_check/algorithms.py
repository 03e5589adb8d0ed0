"""GiGPO beside GRPO: memory and seconds of an update. The paper's claim: the same memory, and 0.15 % more time.

Both train on the same groups with the same engine. What GiGPO adds is in the preparation of an update (step groups and
their advantages), which is timed alone: of whole updates the differences between two runs are larger than 0.15 %.
"""

from __future__ import annotations

import statistics
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.gpu_check.learner import Learner, timed
from benchmarks.gpu_check.rows import Row, at_most, between, measured, skipped
from benchmarks.gpu_check.settings import CARD_NEEDED, Settings, cards
from benchmarks.parts import updates
from learner.prepare import prepare
from services.config.tree import Config
from services.schemas import Trajectory

ALGORITHMS = ("gigpo", "grpo")
CLAIM = 0.0015
"""Share of an update's time, arXiv 2505.10978, section 5.4."""
TIME = 0.005
"""Largest further share that is accepted; the claim is a mean over a longer run."""
MEMORY = 0.99, 1.01
HOST_MEMORY = 1.25
REPEATS, DRY_REPEATS = 5, 1

Groups = list[list[Trajectory]]


def gigpo_beside_grpo(settings: Settings) -> Iterator[Row]:
    if not settings.dry and not cards():
        yield skipped("GiGPO beside GRPO", CARD_NEEDED)
        return
    learner = Learner(settings, 2)
    tokens = 8 * learner.context
    configs = {name: learner.configured(tokens, name) for name in ALGORITHMS}
    groups = made_up(learner)
    preparing = {name: prepare_seconds(groups, config) for name, config in configs.items()}
    host = {name: prepare_bytes(groups, config) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ALGORITHMS}
    peaks: dict[str, int] = {}
    for number in range(1 + (DRY_REPEATS if settings.dry else REPEATS)):
        for name, config in configs.items():
            ((step,),) = prepare(groups, config, 0).work
            if cards():
                torch.cuda.reset_peak_memory_stats()
            taken = timed(partial(updates.apply, learner.first, config, step))
            if number:  # kernels are loaded in the first round
                seconds[name].append(taken)
                peaks[name] = torch.cuda.max_memory_allocated() if cards() else 0
    yield measured("tokens of an update", sum(batch.tokens for batch in step.batches))
    yield from judge_time(preparing, seconds, whole=not settings.dry)
    yield at_most("host memory of preparing, GiGPO over GRPO", host["gigpo"] / host["grpo"], HOST_MEMORY)
    if cards():
        yield from judge_peaks(peaks)
    else:
        yield skipped("peak memory, GiGPO over GRPO", CARD_NEEDED)


def made_up(learner: Learner) -> Groups:
    """Groups whose states repeat, as those that episodes of one task meet."""
    random, vocabulary = np.random.default_rng(0), learner.shape.vocabulary
    if learner.settings.dry:
        return updates.made_up_groups(1, random, vocabulary, prompt=(40, 90), response=(5, 30), steps=(3, 6))
    return updates.made_up_groups(8, random, vocabulary, prompt=(300, learner.prompt), response=(50, learner.response))


def prepare_seconds(groups: Groups, config: Config, repeats: int = 15) -> float:
    """Median seconds of an update's preparation."""
    return statistics.median(timed(partial(prepare, groups, config, 0)) for _ in range(repeats))


def prepare_bytes(groups: Groups, config: Config) -> int:
    """Most memory that the preparation of an update takes at once, as Python and NumPy count it."""
    tracemalloc.start()
    try:
        prepare(groups, config, 0)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def judge_time(preparing: Mapping[str, float], seconds: Mapping[str, Sequence[float]], *, whole: bool) -> Iterator[Row]:
    """Judge what GiGPO adds to an update.

    Args:
        preparing: seconds of the preparation, by algorithm.
        seconds: of the ranks' updates.
        whole: whether an update is as long as a real one, so that its share says something.
    """
    update = {name: preparing[name] + statistics.median(taken) for name, taken in seconds.items()}
    for name, value in update.items():
        yield measured(f"{name}: an update, s", value)
    yield measured("an update, GiGPO over GRPO", update["gigpo"] / update["grpo"])
    yield measured("further time of preparing GiGPO, ms", 1000 * (preparing["gigpo"] - preparing["grpo"]))
    name = "further time of preparing GiGPO, share of an update"
    share = (preparing["gigpo"] - preparing["grpo"]) / update["grpo"]
    if whole:
        row = at_most(name, share, TIME)
        yield Row(row.name, row.value, row.verdict, f"{row.reason}; the paper: {CLAIM:g}")
    else:
        yield skipped(name, "updates of a tiny model are too short to compare with")


def judge_peaks(peaks: Mapping[str, int]) -> Iterator[Row]:
    """Judge the peaks of the card's memory, in bytes by algorithm."""
    for name, peak in peaks.items():
        yield measured(f"{name}: peak memory, GiB", peak / 2**30)
    yield between("peak memory, GiGPO over GRPO", peaks["gigpo"] / peaks["grpo"], *MEMORY)


CHECKS = (gigpo_beside_grpo,)
