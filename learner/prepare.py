"""Turn complete groups into training rows: advantages over all groups first, then one row a step.

Invariants
- Advantages are computed before any row is dropped or assigned to a rank.
- The loss's denominator counts all rows, including those dropped because they cannot move the policy. So dropping them
  changes the time of an update, not its gradient.

Example: one group of two episodes, two steps each, with advantages 0.5 and 0 and two minibatches. `_minibatches` draws
whole episodes, so the optimizer steps are the rows 2 3, then 0 1:

    row         0    1    2    3
    episode     0    0    1    1
    advantage   0.5  0.5  0    0
    tokens      4    6    5    5

    step 1: total_tokens 10, both rows dropped, so row 2 stands in: the optimizer's momentum moves on
    step 2: total_tokens 10, rows 0 and 1 are trained on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from learner.advantages import Advantages, StepRows, estimator_of
from learner.anchors import step_groups
from learner.batching import MicroBatch, Row, Sharing, plan
from services.config.tree import Config
from services.schemas import Step, Trajectory

ZERO_ADVANTAGE = 1e-8
"""Smaller advantages are 0 up to rounding: equal scores give about 1e-10 in float64 (1e-16 / 1e-6)."""


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """One rank's share of one optimizer step.

    Attributes:
        total_tokens: response tokens of the whole step, all ranks, dropped rows included.
        batches: this rank's micro-batches.
        total_rows: rows of the whole step, all ranks, dropped rows included.
    """

    total_tokens: int
    batches: list[MicroBatch]
    total_rows: int = 0


@dataclass(frozen=True, slots=True)
class PreparedUpdate:
    """The work of the ranks in one update, and figures of its rows.

    Attributes:
        work: one list of optimizer steps for each rank.
        rows: number of steps in the groups.
        trained_rows: number of rows left after dropping zero advantages and ignored responses.
        tokens: prompt and response tokens that go through the model.
        response_tokens: of all rows.
        step_group_sizes: int64 [step groups], rows in each.
        advantage_deviation: standard deviation of the rows' advantages.
        cut_fraction: share of responses that ended at the sampling limit.
        table: the rows.
        advantages: of the rows.
    """

    work: list[list[OptimizerStep]]
    rows: int
    trained_rows: int
    tokens: int
    response_tokens: int
    step_group_sizes: NDArray[np.int64]
    advantage_deviation: float
    cut_fraction: float
    table: StepRows
    advantages: Advantages


# An advantage beyond float32 becomes infinite here; `learner.soundness` finds its group.
@np.errstate(over="ignore")
def prepare(
    groups: Sequence[Sequence[Trajectory]], config: Config, update: int, sharing: Sharing = "lines"
) -> PreparedUpdate:
    """Compute advantages and micro-batches of an update.

    Args:
        groups: trajectories of each group, complete.
        config: of the run.
        update: number of the update; seeds the order of rows, and is the policy version whose tokens are fresh.
        sharing: what rows may share on their way through the model.
    """
    steps = [step for group in groups for trajectory in group for step in trajectory.steps]
    rows = step_rows(groups, config)
    estimated = estimator_of(config)(rows, config.advantage)
    cut = np.array([not step.finished for step in steps])
    ignored = cut & config.advantage.ignore_cut_responses
    estimated = replace(estimated, total=np.where(ignored, 0.0, estimated.total))
    advantages = estimated.total
    kept = _kept(advantages, config) & ~ignored
    parts = _minibatches(rows.trajectory, config, update)
    ranks = config.learner.ranks
    work: list[list[OptimizerStep]] = [[] for _ in range(ranks)]
    for part in parts:
        total = sum(len(steps[i].response_ids) for i in part)
        # If nothing is left, one row of advantage 0 keeps the optimizer step: its momentum moves on.
        trained = [i for i in part if kept[i]] or part[:1]
        chosen = [_row(steps[i], float(advantages[i]), update, counts=not ignored[i]) for i in trained]
        shares = plan(chosen, ranks, config.learner.microbatch_tokens, sharing)
        for own, batches in zip(work, shares, strict=True):
            own.append(OptimizerStep(total_tokens=total, batches=batches, total_rows=len(part)))
    return PreparedUpdate(
        work=work,
        rows=len(steps),
        trained_rows=int(kept.sum()),
        tokens=sum(batch.tokens for own in work for step in own for batch in step.batches),
        response_tokens=sum(len(step.response_ids) for step in steps),
        step_group_sizes=np.bincount(rows.step_group),
        advantage_deviation=float(advantages.std()),
        cut_fraction=float(cut.mean()),
        table=rows,
        advantages=estimated,
    )


def step_rows(groups: Sequence[Sequence[Trajectory]], config: Config) -> StepRows:
    """Tabulate the steps of the groups, in the order of group, member and step."""
    played = [(number, trajectory) for number, group in enumerate(groups) for trajectory in group]
    lengths = [len(trajectory.steps) for _, trajectory in played]
    group = np.repeat([number for number, _ in played], lengths).astype(np.int64)
    steps = [step for _, trajectory in played for step in trajectory.steps]
    return StepRows(
        group=group,
        trajectory=np.repeat(np.arange(len(played)), lengths),
        step=np.concatenate([np.arange(length) for length in lengths]),
        step_group=step_groups(group, [step.anchor for step in steps], config.advantage.similarity),
        reward=np.array([step.reward for step in steps], dtype=np.float64),
        valid=np.array([step.valid for step in steps], dtype=np.bool_),
    )


def _minibatches(trajectory: NDArray[np.int64], config: Config, update: int) -> list[list[int]]:
    """Row numbers of each optimizer step, ascending.

    Whole trajectories in an order drawn from seed and update: rows of one trajectory may share a sequence.

    Args:
        trajectory: int64 [N], trajectory of each row, ascending.
        config: of the run.
        update: number of the update.
    """
    count = int(trajectory[-1]) + 1
    order = np.random.default_rng([config.run.seed, update]).permutation(count)
    parts = np.array_split(order, min(config.learner.minibatches, count))
    return [np.flatnonzero(np.isin(trajectory, part)).tolist() for part in parts]


def _kept(advantages: NDArray[np.float64], config: Config) -> NDArray[np.bool_]:
    """bool [N]: rows that can move the policy; all of them if KL or entropy move it whatever the advantage."""
    if not config.loss.skips_zero_advantage:
        return np.ones(len(advantages), dtype=np.bool_)
    return np.abs(advantages) > ZERO_ADVANTAGE


def _row(step: Step, advantage: float, version: int, *, counts: bool) -> Row:
    spans = step.versions
    return Row(
        tokens=np.concatenate([step.prompt_ids, step.response_ids]).astype(np.int32),
        logprobs=step.logprobs,
        advantage=advantage,
        counts=counts,
        fresh=np.repeat([span.version == version for span in spans], [span.tokens for span in spans]),
    )
