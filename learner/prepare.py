"""Turn complete groups into training rows: advantages of turns over all groups first, then one row a trained call.

Invariants
- Advantages are computed before any row is dropped or assigned to a rank.
- Estimators see turns: one decision each, however many calls it took (`services.turns`). Its advantage is that of every
  token of each of its calls. Tokens, limits and losses are counted by calls.
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

Example: two episodes of an agent program, γ 0.5. In the first it called a frozen summariser (f), then made three calls
for its decision in state A, and one in B that wins. In the second it made one call in A, and lost.

    step            0    1    2    3    4   |  0
    state           A    A    A    A    B   |  A
    trained         f    yes  yes  yes  yes |  yes
    reward          0    0    0    0    10  |  0
    row             -    0    1    2    3   |  4
    turn            -    0    0    0    1   |  2      what the estimator gets: three rows
    return of turn       5    5    5    10  |  0      not 1.25, 2.5, 5: calls do not discount
    step group           {turn 0, turn 2}, {turn 1}   GiGPO, mean: A_S = 2.5, −2.5, 0
    A_S of row           2.5  2.5  2.5  0   |  −2.5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from learner.advantages import Advantages, StepRows, estimator_of
from learner.anchors import Ids, final_states, graph_nodes, step_groups
from learner.batching import MicroBatch, Row, Sharing, plan
from services.config.tree import Config
from services.schemas import Step, Trajectory
from services.turns import Turns, turns_of

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
        rows: number of trained calls in the groups.
        trained_rows: number of rows left after dropping zero advantages and ignored responses.
        tokens: prompt and response tokens that go through the model.
        response_tokens: of all rows.
        step_group_sizes: int64 [step groups], turns in each.
        advantage_deviation: standard deviation of the rows' advantages.
        cut_fraction: share of responses that ended at the sampling limit.
        table: the T turns, as estimators get them.
        turn: int64 [rows], place in the table of the turn of each row.
        advantages: float64 [rows] each, of the rows: those of their turns, 0 in total where a response is ignored.
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
    turn: Ids
    advantages: Advantages


@dataclass(frozen=True, slots=True)
class Calls:
    """The trained calls of groups, in the order of group, member and step, and the turns that they make.

    Attributes:
        steps: the N calls.
        turn: int64 [N], place in `table` of the turn of each.
        table: the T turns in the same order; `table.step` is a turn's number in its episode.
    """

    steps: list[Step]
    turn: Ids
    table: StepRows


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
    calls = tabulate(groups, config)
    steps, table = calls.steps, calls.table
    estimated = _of_calls(estimator_of(config)(table, config.advantage), calls.turn)
    cut = np.array([not step.finished for step in steps])
    ignored = cut & config.advantage.ignore_cut_responses
    estimated = replace(estimated, total=np.where(ignored, 0.0, estimated.total))
    advantages = estimated.total
    kept = _kept(advantages, config) & ~ignored
    parts = _minibatches(table.trajectory[calls.turn], config, update)
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
        step_group_sizes=np.bincount(table.step_group),
        advantage_deviation=float(advantages.std()),
        cut_fraction=float(cut.mean()),
        table=table,
        turn=calls.turn,
        advantages=estimated,
    )


def step_rows(groups: Sequence[Sequence[Trajectory]], config: Config) -> StepRows:
    """Tabulate the turns of the groups, in the order of group, member and turn."""
    return tabulate(groups, config).table


def tabulate(groups: Sequence[Sequence[Trajectory]], config: Config) -> Calls:
    """Tabulate the trained calls of the groups and the turns that they make. Episodes without one have no rows."""
    episodes = [(place, turns_of(episode.steps), episode) for place, group in enumerate(groups) for episode in group]
    played = [(place, turns, episode) for place, turns, episode in episodes if len(turns)]
    lengths = np.array([len(turns) for _, turns, _ in played], dtype=np.int64)
    group = np.repeat(np.array([place for place, _, _ in played], dtype=np.int64), lengths)
    step_group, state, next_state = _states(group, lengths, played, config)
    table = StepRows(
        group=group,
        trajectory=np.repeat(np.arange(len(played)), lengths),
        step=np.concatenate([np.arange(length) for length in lengths], dtype=np.int64),
        step_group=step_group,
        reward=np.array([reward for _, turns, _ in played for reward in turns.reward], dtype=np.float64),
        valid=np.array([valid for _, turns, _ in played for valid in turns.valid], dtype=np.bool_),
        state=state,
        next_state=next_state,
    )
    numbers = [np.array(turns.number, dtype=np.int64) for _, turns, _ in played]
    first = np.cumsum(lengths) - lengths
    return Calls(
        steps=[step for _, _, episode in played for step in episode.steps if step.trained],
        turn=np.concatenate([place + own[own >= 0] for place, own in zip(first, numbers, strict=True)]),
        table=table,
    )


def _states(
    group: Ids, lengths: Ids, played: Sequence[tuple[int, Turns, Trajectory]], config: Config
) -> tuple[Ids, Ids | None, Ids]:
    """`step_group`, `state` and `next_state` of the table's rows."""
    similarity, is_graph = config.advantage.similarity, config.advantage.similarity_of == "graph"
    anchors = [anchor for _, turns, _ in played for anchor in turns.anchor]
    finals = [episode.final_anchor for _, _, episode in played]
    ends = np.cumsum(lengths) - 1
    if is_graph and similarity is not None:
        last = np.zeros(len(group), dtype=np.bool_)
        last[ends] = True
        # A won episode ends at the goal, which resembles no state.
        open_ends = [None if episode.won else final for (_, _, episode), final in zip(played, finals, strict=True)]
        return step_groups(group, anchors), *graph_nodes(group, anchors, last, open_ends, similarity)
    step_group, final = final_states(group, anchors, group[ends], finals, None if is_graph else similarity)
    after = np.append(step_group[1:], -1)
    after[ends] = final
    return step_group, None, after


def _of_calls(turns: Advantages, turn: Ids) -> Advantages:
    return Advantages(episode=turns.episode[turn], step=turns.step[turn], total=turns.total[turn])


def _minibatches(trajectory: NDArray[np.int64], config: Config, update: int) -> list[list[int]]:
    """Row numbers of each optimizer step, ascending.

    Whole trajectories in an order drawn from seed and update: rows of one trajectory may share a sequence.

    Args:
        trajectory: int64 [rows], trajectory of each row, ascending.
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
