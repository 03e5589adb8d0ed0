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
        values = returns[members]
        of = moments(values, group, rows=members)
        found = normalised(values, of.population if published else of, rows, config)
        counts = _counts(found) if published else np.ones(len(members))
        yield _Level(members, counts * found, counts, (depth + (2.0 if published else 1.0)) ** config.history_power)


def _counts(level: Floats) -> Floats:
    """1 where an advantage is not 0 up to rounding, else 0."""
    return (np.abs(level) > NEGLIGIBLE).astype(np.float64)


def history_groups(rows: StepRows, history: int) -> list[tuple[Ids, Ids]]:
    """G_0 … G_K without lone steps: for each the rows that are in one with another, int64 [M], and its number [M].

    A row that is alone in G_k is alone in deeper ones too, so each level looks only at the rows of the one before.

    Example, K = 1: trajectories A B C and D B C, rows 0 1 2 and 3 4 5.

        G_0    rows 1 4 (B) and 2 5 (C)
        G_1    rows 2 5 (C after B); B came after A and after D
    """
    before, state = earlier_rows(rows), dense(rows.step_group)
    members, ancestor, group = _together(np.arange(len(rows)), np.arange(len(rows)), state)
    levels = [(members, group)]
    for _ in range(history):
        earlier = before[ancestor]
        has = earlier >= 0
        members, ancestor = members[has], earlier[has]
        members, ancestor, group = _together(members, ancestor, _pairs(group[has], state[ancestor]))
        levels.append((members, group))
    return levels


def _together(*columns: Ids) -> tuple[Ids, ...]:
    """The entries of all columns whose value in the last one, a group's number, occurs more than once."""
    group = columns[-1]
    kept = (np.bincount(group) > 1)[group]
    return tuple(column[kept] for column in columns)


def _pairs(first: Ids, second: Ids) -> Ids:
    """Numbers from 0, the same for entries that agree in both; int64 [M]. Faster than `joint_ids`, in no order."""
    codes = first * (int(second.max(initial=0)) + 1) + second
    order = np.argsort(codes)
    ordered = codes[order]
    out = np.empty(len(codes), dtype=np.int64)
    out[order] = np.cumsum(np.append(False, ordered[1:] != ordered[:-1])[: len(codes)])
    return out
