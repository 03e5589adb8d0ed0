"""HGPO: hierarchy-of-groups policy optimisation (He et al. 2026, arXiv:2602.22817; code: verl-agent, recipe/hgpo).

    G_k(t) = steps of the group that were taken in the same state as t, after the same k states,   k = 0 … K
    a_k    = (R_t − mean) / F           over G_k(t), R the step returns of GiGPO
    A      = Σ_k w_k · a_k / (Σ_k w_k + 1e-6)         the same for every token of a response

over the k for which G_k(t) exists (as many states came before t) and a_k counts. Deep groups compare like with like but
are small, shallow ones are large but mix histories. `advantage.history_form` says which form of it:

    published    w_k = (k + 2)^α; F the population's deviation + 1e-6, or 1; a_k counts where it is not 0. With
                 `base_group` the episode level A_E of GiGPO joins as one more a of weight 1.
    paper        w_k = (k + 1)^α, no 1e-6; F with ddof 1; a_k counts where G_k(t) holds another step.

docs/algorithms.md says what is known of the paper.

Example, published, α 1, K 1: step t was taken in a state with returns 1 and 3, its own being 3, and alone after its
history: a_0 = (3 − 2) / 1, no a_1, so A = 2 · 1 / 2 = 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from learner.advantages.description import RETURNS, describe, divisor, scaled_penalty
from learner.advantages.episodes import episode_advantages
from learner.advantages.rows import EPSILON, Advantages, Floats, Ids, StepRows, dense, earlier_rows, step_returns
from learner.advantages.statistics import NEGLIGIBLE, moments, normalised
from services.config.tree import AdvantageConfig


def _weight(config: AdvantageConfig) -> str:
    first = 2 if config.history_form == "published" else 1
    base = "; 1 for the episode's advantage A_E, which joins them" if config.base_group else ""
    return f"(k + {first})^{config.history_power:g}{base}"


@describe(
    "HGPO",
    paper="He et al. 2026, arXiv:2602.22817",
    step={
        "R_t = r_t + γ R_{t+1}": "what a step led to",
        "A_k = (R_t − mean) / F": "over the steps taken in the same state after the same k states; 0 for a lone step",
        "A_S = Σ w_k A_k / Σ w_k": "k = 0, 1, …: longer common histories weigh more",
    },
    total={"A = A_S": "an episode's score counts through what each of its steps led to"},
    terms={
        "F": divisor,
        **RETURNS,
        "k": "at most {history}",
        "w_k": _weight,
        "invalid action": scaled_penalty,
    },
)
def hgpo(rows: StepRows, config: AdvantageConfig) -> Advantages:
    """Compute the advantages of all rows."""
    weighted, weights = np.zeros(len(rows)), np.zeros(len(rows))
    for level in _levels(rows, config):
        weighted[level.members] += level.weight * level.advantages
        weights[level.members] += level.weight * level.counts
    total: Floats = weighted / (weights + EPSILON if config.history_form == "published" else np.maximum(weights, 1.0))
    return Advantages(episode=np.zeros(len(rows)), step=total, total=total)


@dataclass(frozen=True, slots=True)
class _Level:
    """One level's part in the sum.

    Attributes:
        members: int64 [M], rows that have it.
        advantages: float64 [M], 0 where it does not count.
        counts: float64 [M], 1 where it counts, else 0.
        weight: of the level.
    """

    members: Ids
    advantages: Floats
    counts: Floats
    weight: float


def _levels(rows: StepRows, config: AdvantageConfig) -> Iterator[_Level]:
    returns = step_returns(rows, config.gamma, config.invalid_action_penalty)
    published = config.history_form == "published"
    if config.base_group:
        base = episode_advantages(rows, config)
        yield _Level(np.arange(len(rows)), base, _counts(base), 1.0)
    for depth, (members, group) in enumerate(history_groups(rows, config.history)):
        of = moments(returns[members], group, rows=members)
        found = normalised(returns[members], of.population if published else of, rows, config)
        counts = _counts(found) if published else (of.row_count > 1).astype(np.float64)
        yield _Level(members, counts * found, counts, (depth + (2.0 if published else 1.0)) ** config.history_power)


def _counts(level: Floats) -> Floats:
    """1 where an advantage is not 0 up to rounding, else 0."""
    return (np.abs(level) > NEGLIGIBLE).astype(np.float64)


def history_groups(rows: StepRows, history: int) -> list[tuple[Ids, Ids]]:
    """G_0 … G_K: for each the rows in it, int64 [M] in any order, and the number of each row's group [M].

    G_0 has all rows. Deeper ones have only those that share their group: a row that is alone in one is alone in all
    that are deeper.

    Example, K = 1: trajectories A B C and D B C, rows 0 1 2 and 3 4 5.

        G_0    A: 0   B: 1 4   C: 2 5   D: 3
        G_1    C after B: 2 5            B came after A and after D
    """
    before = earlier_rows(rows)
    state = dense(rows.step_group)
    members = ancestor = np.arange(len(rows))
    group = state
    levels = [(members, group)]
    for _ in range(history):
        earlier = before[ancestor]
        has = earlier >= 0
        members, ancestor, group = members[has], earlier[has], group[has]
        shared, group = _shared(group, state[ancestor])
        members, ancestor = members[shared], ancestor[shared]
        levels.append((members, group))
    return levels


def _shared(first: Ids, second: Ids) -> tuple[Ids, Ids]:
    """The entries that agree in both numbers with another one: their places, and the same number for those that agree.

    Example: `first` 3 3 5 3 and `second` 7 8 7 7 give the places 0 3 and the numbers 0 0.
    """
    codes = first * (int(second.max(initial=0)) + 1) + second
    order = np.argsort(codes)
    ordered = codes[order]
    same = ordered[1:] == ordered[:-1]
    as_before = np.append(False, same)[: len(codes)]
    kept = as_before | np.append(same, False)[: len(codes)]
    return order[kept], np.cumsum(~as_before[kept]) - 1
