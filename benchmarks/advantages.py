"""Speed and memory of an update's computations: grouping, step returns and advantages.

`python -m benchmarks.advantages [--json FILE]`. All seconds are processor time of one thread. Four measurements:
a million step rows; the estimators that compare steps, in turn on 100,000 rows; fewer rows, compared with the per-row
loops of published implementations (in a naive version); and an update of the demo's size on the starter policy, with
GiGPO and with GRPO, each in its own process.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import socket
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks import record
from env_servers.arguments import positive, seconds
from learner.advantages import ESTIMATORS, Advantages, StepRows
from learner.advantages.rows import EPSILON
from learner.anchors import step_groups
from learner.dispatch import Dispatcher
from learner.prepare import prepare, step_rows
from services.config import load_config
from services.config.tree import AdvantageConfig, Config
from services.schemas import Step, Ticket, Trajectory, VersionSpan

STEP_LEVEL = ("gigpo", "hgpo", "graphgpo", "g2po")
"""Estimators that compare steps, whose times are given as multiples of GiGPO's."""
RATIO_ROWS = 100_000
RATIO_REPEATS = 15
STEPS_PER_EPISODE = 20
GROUP_SIZE = 8
STATES_PER_TASK = 40
DEMO_STEPS = 16
REPEATS = 3
MIB = 1024 * 1024
DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"

Figures = dict[str, float]


class Played:
    """Step rows of synthetic episodes as plain columns, the input of both implementations."""

    def __init__(self, rows: int) -> None:
        rng = np.random.default_rng(0)
        episodes = -(-rows // STEPS_PER_EPISODE)
        self.trajectory = np.repeat(np.arange(episodes), STEPS_PER_EPISODE)[:rows]
        self.step = np.tile(np.arange(STEPS_PER_EPISODE), episodes)[:rows]
        self.group = self.trajectory // GROUP_SIZE
        # Observations as long as ALFWorld's, each a separate object, as when they are read from Redis.
        places = [
            f"You are in the middle of a room. Looking quickly around you, you see a cabinet {n}, a countertop 1, "
            f"a drawer {n % 7} and a shelf {n % 3}. On the shelf {n % 3}, you see a vase 1."
            for n in range(STATES_PER_TASK)
        ]
        self.anchors = [places[place].replace("  ", " ") + " " for place in rng.integers(0, STATES_PER_TASK, rows)]
        won = rng.random(episodes) < 0.5
        self.reward = np.where((self.step == STEPS_PER_EPISODE - 1) & won[self.trajectory], 10.0, 0.0)
        self.valid = rng.random(rows) < 0.9

    def grouped(self) -> StepRows:
        groups = step_groups(self.group, self.anchors)
        return StepRows(self.group, self.trajectory, self.step, groups, self.reward, self.valid)


def measure_many_rows(count: int) -> Figures:
    """Return the seconds of grouping and of each estimator, and their peak allocation in MiB."""
    played, config = Played(count), AdvantageConfig()
    figures = {"rows": float(count), "grouping_s": _least(played.grouped)}
    rows = played.grouped()
    for name, estimator in ESTIMATORS.items():
        figures[f"{name}_s"] = _least(partial(estimator, rows, config))
    figures["gigpo_total_s"] = figures["grouping_s"] + figures["gigpo_s"]
    figures["gigpo_peak_mib"] = _peak(lambda: ESTIMATORS["gigpo"](played.grouped(), config))
    figures["grpo_peak_mib"] = _peak(lambda: ESTIMATORS["grpo"](played.grouped(), config))
    return figures


def measure_ratios(count: int) -> Figures:
    """Return the seconds of the estimators that compare steps, each in turn, several times; the least of each."""
    rows, config = Played(count).grouped(), AdvantageConfig()
    spent = dict.fromkeys(STEP_LEVEL, math.inf)
    for _ in range(RATIO_REPEATS):
        for name in STEP_LEVEL:
            spent[name] = min(spent[name], _least(partial(ESTIMATORS[name], rows, config), 1))
    return {"rows": float(count)} | {f"{name}_s": seconds for name, seconds in spent.items()}


def measure_naive(count: int) -> Figures:
    """Compute the same advantages with our arrays and with loops over rows."""
    played, config = Played(count), AdvantageConfig()

    def arrays() -> Advantages:
        return ESTIMATORS["gigpo"](played.grouped(), config)

    def loops() -> NDArray[np.float64]:
        return naive_gigpo(played, config)

    began = time.process_time()
    naive = loops()
    naive_s = time.process_time() - began
    np.testing.assert_allclose(arrays().total, naive, atol=1e-5)
    return {
        "rows": float(count),
        "arrays_s": _least(arrays),
        "loops_s": naive_s,
        "arrays_peak_mib": _peak(arrays),
        "loops_peak_mib": _peak(loops),
    }


def naive_gigpo(played: Played, config: AdvantageConfig) -> NDArray[np.float64]:
    """GiGPO row by row: for each row, its trajectory is searched by name among all rows."""
    group = np.array([f"group-{number}" for number in played.group], dtype=object)
    trajectory = np.array([f"trajectory-{number}" for number in played.trajectory], dtype=object)
    scores, returns = np.zeros(len(group)), np.zeros(len(group))
    for row, name in enumerate(trajectory):
        own = np.where(trajectory == name)[0]
        rewards = played.reward[own]
        place = int(np.where(own == row)[0][0])
        penalty = 0.0 if played.valid[row] else config.invalid_action_penalty
        scores[row] = rewards.sum() - penalty
        returns[row] = sum(config.gamma**k * reward for k, reward in enumerate(rewards[place:])) - penalty
    anchor_of = np.array([f"{name} {anchor}" for name, anchor in zip(group, played.anchors, strict=True)], dtype=object)
    return _naive_relative(scores, group) + config.omega * _naive_relative(returns, anchor_of)


def _naive_relative(values: NDArray[np.float64], names: NDArray[np.object_]) -> NDArray[np.float64]:
    members: defaultdict[str, list[float]] = defaultdict(list)
    for value, name in zip(values, names, strict=True):
        members[name].append(float(value))
    centre = {name: mean(own) for name, own in members.items()}
    spread = {name: stdev(own) if len(own) > 1 else 0.0 for name, own in members.items()}
    out = np.zeros(len(values))
    for row, (value, name) in enumerate(zip(values, names, strict=True)):
        if len(members[name]) > 1:
            out[row] = (value - centre[name]) / (spread[name] + EPSILON)
    return out


def measure_update(update_seconds: float | None) -> Figures:
    """Return the time that GiGPO adds to an update of the demo's size, and the time of the update."""
    config = _demo("gigpo")
    groups = demo_groups(config)
    anchors = [step.anchor for group in groups for episode in group for step in episode.steps]
    rows = step_rows(groups, config)
    grouping = _least(lambda: step_groups(rows.group, anchors), 100)
    spent = {name: _least(partial(ESTIMATORS[name], rows, config.advantage), 100) for name in ("gigpo", "grpo")}
    extra = grouping + spent["gigpo"] - spent["grpo"]
    figures = {"rows": float(len(rows)), "grouping_s": grouping, "gigpo_s": spent["gigpo"], "grpo_s": spent["grpo"]}
    if update_seconds is None:
        for name in ("gigpo", "grpo"):
            figures |= {f"{name}_{key}": value for key, value in _in_new_process(name).items()}
        update_seconds = figures["grpo_update_s"]
    return figures | {"extra_s": extra, "update_s": update_seconds, "extra_percent": 100 * extra / update_seconds}


def demo_groups(config: Config) -> list[list[Trajectory]]:
    """Return complete groups in which each prompt extends the previous one, as in the demo."""
    vocabulary = json.loads((config.model.path / "config.json").read_text())["vocab_size"]
    learner = config.learner
    tickets = Dispatcher(config, {config.env.split: 1000}).tickets(range(learner.groups_per_update))
    return [
        [_episode(ticket, vocabulary) for ticket in tickets if ticket.group == group]
        for group in range(learner.groups_per_update)
    ]


def _episode(ticket: Ticket, vocabulary: int) -> Trajectory:
    rng = np.random.default_rng(ticket.seed)
    text = np.random.default_rng(ticket.group).integers(5, vocabulary, 100).astype(np.int32)
    won = rng.random() < 0.5
    steps = []
    for number in range(DEMO_STEPS):
        response = rng.integers(5, vocabulary, 6).astype(np.int32)
        last = number == DEMO_STEPS - 1
        steps.append(
            Step(
                prompt_ids=text,
                response_ids=response,
                logprobs=np.full(len(response), -1.0, dtype=np.float32),
                versions=(VersionSpan(0, len(response)),),
                anchor=f"You arrive at place {rng.integers(0, 30)}. On it, you see a vase 1 and a book 2.",
                observation="",
                prompt="",
                response="",
                action="look",
                reward=10.0 if won and last else 0.0,
                valid=bool(rng.random() < 0.9),
                terminated=last,
            )
        )
        text = np.concatenate([text, response, rng.integers(5, vocabulary, 20).astype(np.int32)])
    return Trajectory(ticket=ticket, steps=tuple(steps))


def _demo(algorithm: str) -> Config:
    # All rows are trained on, so that both algorithms do the same work and differ only in their advantages.
    return load_config(DEMO, [f"algorithm={algorithm}", "loss.drop_zero_advantage=false"])


def _in_new_process(algorithm: str) -> Figures:
    os.environ.update(
        OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_DISABLE_PROGRESS_BARS="1"
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_update, algorithm).result(timeout=600)


def _update(algorithm: str) -> Figures:
    """Return the minimum seconds of an update in the rank, and the peak memory of its process in MiB."""
    from learner.rank.rank import Rank

    config = _demo(algorithm)
    rank = Rank(config, 0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank.connect("127.0.0.1", port)
    seconds = []
    for number in range(REPEATS):
        (steps,) = prepare(demo_groups(config), config, number).work
        began = time.process_time()
        rank.update(steps)
        seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"update_s": min(seconds), "update_peak_mib": peak}


def _least(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the minimum processor seconds of several calls."""
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return min(spent)


def _peak(work: Callable[[], object]) -> float:
    """Return the peak allocation of a call, in MiB."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / MIB


def measure(rows: int, naive_rows: int, update_seconds: float | None) -> dict[str, object]:
    """Return all figures and a description of the machine."""
    return {
        "machine": record.machine(),
        "many_rows": measure_many_rows(rows),
        "ratios": measure_ratios(RATIO_ROWS),
        "loops": measure_naive(naive_rows),
        "demo_update": measure_update(update_seconds),
    }


def show(figures: Mapping[str, object], console: Console) -> None:
    """Print the figures as tables."""
    many, ratios, loops, update = (
        record.section(figures, key) for key in ("many_rows", "ratios", "loops", "demo_update")
    )
    table = Table(title=f"{many['rows']:,.0f} step rows, one core", show_header=False)
    table.add_row("step groups by exact key", f"{many['grouping_s']:.3f} s")
    for name in ESTIMATORS:
        table.add_row(f"{name}, after grouping", f"{many[f'{name}_s']:.3f} s")
    table.add_row("GiGPO with grouping", f"{many['gigpo_total_s']:.3f} s")
    table.add_row("peak allocation, GiGPO | GRPO", f"{many['gigpo_peak_mib']:,.0f} | {many['grpo_peak_mib']:,.0f} MiB")
    console.print(table)
    table = Table(title=f"{ratios['rows']:,.0f} step rows, after grouping, times GiGPO's time", show_header=False)
    for name in STEP_LEVEL:
        seconds = ratios[f"{name}_s"]
        table.add_row(name, f"{1e3 * seconds:.1f} ms", f"{seconds / ratios['gigpo_s']:.2f}")
    console.print(table)
    table = Table(title=f"GiGPO on {loops['rows']:,.0f} rows")
    for heading in ("", "arrays", "loops over rows", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, key, unit in (("processor time", "s", "s"), ("peak allocation", "peak_mib", "MiB")):
        ours, theirs = loops[f"arrays_{key}"], loops[f"loops_{key}"]
        table.add_row(label, f"{ours:,.3f} {unit}", f"{theirs:,.3f} {unit}", f"{theirs / ours:,.1f} ×")
    console.print(table)
    table = Table(title=f"An update of the demo's size, {update['rows']:,.0f} rows", show_header=False)
    table.add_row("time in the rank", f"{update['update_s']:.3f} s")
    table.add_row(
        "additional time of GiGPO over GRPO", f"{1e3 * update['extra_s']:.2f} ms, {update['extra_percent']:.3f} %"
    )
    if "gigpo_update_peak_mib" in update:
        peaks = f"{update['gigpo_update_peak_mib']:,.0f} | {update['grpo_update_peak_mib']:,.0f} MiB"
        table.add_row("peak memory of the process, GiGPO | GRPO", peaks)
    console.print(table)


def main() -> None:
    parser = record.parser("Measure the computation of advantages in an update.")
    parser.add_argument("--rows", type=positive, default=1_000_000, help="step rows of the large measurement")
    parser.add_argument("--naive-rows", type=positive, default=20_000, help="step rows of the comparison with loops")
    parser.add_argument("--update-seconds", type=seconds, help="duration of an update, instead of measuring it")
    options = parser.parse_args()
    figures = measure(options.rows, options.naive_rows, options.update_seconds)
    show(figures, Console())
    record.keep(figures, options.json)


if __name__ == "__main__":
    main()
