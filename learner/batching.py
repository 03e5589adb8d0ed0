"""Rows to micro-batches: what each rank runs through the model, in which order.

Invariants
- Deterministic: the plan is a function of the rows, the number of ranks and the token budget.
- A forward pass is one line of tokens without padding, at most the budget's (a longer single row goes alone).
- Every rank does the same number of forward passes, as collectives need it, of nearly the same length; one that is
  short of work repeats a batch with weight 0.
- A token is computed once for all rows of a line that begin with the same tokens up to it: in causal attention its
  hidden state is the same there. Each row keeps its own loss. An episode whose prompts go on from one another is thus
  one sequence, and the episodes of a group share their beginning.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

Sharing = Literal["lines", "prefixes", "nothing"]
"""What rows share. `lines`: a forward pass holds many sequences, which share beginnings. `prefixes`: it holds one
sequence, and rows that begin that one. `nothing`: it holds one row."""

MIN_SHARED = 32
"""Shorter common beginnings are computed again: that costs less than to read them from another sequence."""
UNITS_PER_BATCH = 2
"""Sequences are dealt in units of at most the budget's so-manieth part: smaller ones balance better, share less."""


@dataclass(frozen=True, slots=True)
class Row:
    """One step as the learner trains on it.

    Attributes:
        tokens: int32 [P + R], prompt then response.
        logprobs: float32 [R], of the response under the sampler.
        advantage: of every response token.
        counts: its tokens are trained on; if not, they only fill a batch.
        fresh: bool [R], sampled by the policy version that is being updated; None: none of them.
    """

    tokens: NDArray[np.int32]
    logprobs: Floats
    advantage: float
    counts: bool = True
    fresh: NDArray[np.bool_] | None = None

    @property
    def response_tokens(self) -> int:
        return len(self.logprobs)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass: a line of L tokens that holds S sequences and T response tokens.

    Attributes:
        input_ids: int64 [1, L]. position_ids: int64 [1, L], place of each token in its own sequence.
        starts / path_starts / path: where the sequences lie, see `learner.rank.attention.Layout`.
        positions: int64 [T], place in the line of the token that predicts each response token.
        targets: int64 [T], the response tokens.
        behaviour: float32 [T], the sampler's log-probabilities.
        advantage: float32 [T].
        weight: float32 [T], 1 or 0.
        fresh: float32 [T], 1 where the policy version that is being updated sampled the token, else 0.
        sequence: int64 [T], number within the micro-batch of the row that each response token belongs to.
        tokens: L, or 0 in a batch that only fills.
        widest: the largest T of the passes that run at the same time, one on each rank.
    """

    input_ids: Ids
    position_ids: Ids
    starts: Ids
    path_starts: Ids
    path: Ids
    positions: Ids
    targets: Ids
    behaviour: Floats
    advantage: Floats
    weight: Floats
    fresh: Floats
    sequence: Ids
    tokens: int
    widest: int


@dataclass(frozen=True, slots=True)
class _Family:
    """Rows that one sequence holds: the longest first. `shared`: tokens in common with the family before it."""

    rows: list[int]
    length: int
    shared: int


def plan(rows: Sequence[Row], ranks: int, budget: int, sharing: Sharing = "lines") -> list[list[MicroBatch]]:
    """Micro-batches of each rank, equally many; `budget` tokens at most in each of several sequences.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no rows to train on")
    if sharing == "lines":
        units = _units(_families(rows), budget // UNITS_PER_BATCH)
        lines = [[family for unit in some for family in unit] for some in _bins(units, ranks, budget)]
    else:
        families = _families(rows) if sharing == "prefixes" else _every_row(rows)
        lines = [[family] for family in sorted(families, key=lambda family: -family.length)]
    batches = [_pack(families, rows) for families in lines]
    filler = replace(batches[-1], weight=np.zeros_like(batches[-1].weight), tokens=0)
    shares: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    for number in range(0, len(batches), ranks):
        together = batches[number : number + ranks]
        together += [filler] * (ranks - len(together))
        widest = max(len(batch.targets) for batch in together)
        together = [replace(batch, widest=widest) for batch in together]
        # Longest first, back and forth: the ranks of one pass are nearly even, and so are their sums.
        for own, batch in zip(shares if number // ranks % 2 == 0 else reversed(shares), together, strict=True):
            own.append(batch)
    return shares


def _families(rows: Sequence[Row]) -> list[_Family]:
    """Which rows share a sequence, in the lexicographic order of their tokens.

    In that order a row comes right before those that it begins, and each sequence next to those that it has most in
    common with, so one walk from the end finds all of it.
    """
    texts = [row.tokens.astype(">u4").tobytes() for row in rows]
    members: list[list[int]] = []
    for number in sorted(range(len(rows)), key=texts.__getitem__, reverse=True):
        if members and texts[members[-1][0]].startswith(texts[number]):
            members[-1].append(number)
        else:
            members.append([number])
    members.reverse()
    families: list[_Family] = []
    before: NDArray[np.int32] = np.zeros(0, np.int32)
    for some in members:
        tokens = rows[some[0]].tokens
        families.append(_Family(rows=some, length=len(tokens), shared=_common(before, tokens)))
        before = tokens
    return families


def _every_row(rows: Sequence[Row]) -> list[_Family]:
    return [_Family(rows=[number], length=len(row.tokens), shared=0) for number, row in enumerate(rows)]


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """Length of the common beginning."""
    size = min(len(one), len(other))
    differs = one[:size] != other[:size]
    return int(differs.argmax()) if differs.any() else size


def _units(families: list[_Family], limit: int) -> list[list[_Family]]:
    """Neighbours that share a beginning, cut where a unit would pass `limit` tokens."""
    units: list[list[_Family]] = []
    size = 0
    for family in families:
        own = family.length - family.shared
        if units and family.shared >= MIN_SHARED and size + own <= limit:
            units[-1].append(family)
            size += own
        else:
            units.append([family])
            size = family.length
    return units


def _size(unit: list[_Family]) -> int:
    return unit[0].length + sum(family.length - family.shared for family in unit[1:])


def _bins(units: list[list[_Family]], ranks: int, budget: int) -> list[list[list[_Family]]]:
    """Units of each forward pass, longest pass first: as few passes a rank as fit the budget, nearly equally long.

    Longest unit first into the emptiest pass, whose maximum is at most a third over the best possible.
    """
    sizes = [_size(unit) for unit in units]
    order = sorted(range(len(units)), key=lambda number: (-sizes[number], number))
    passes = max(1, -(-sum(sizes) // (ranks * budget)))
    while True:
        loads = [(0, place) for place in range(ranks * passes)]
        bins: list[list[int]] = [[] for _ in loads]
        for number in order:
            load, place = loads[0]
            heapq.heapreplace(loads, (load + sizes[number], place))
            bins[place].append(number)
        if all(load <= budget or len(bins[place]) == 1 for load, place in loads):
            break
        passes += 1
    by_place = {place: load for load, place in loads}
    full = [place for place in range(len(bins)) if bins[place]]
    return [[units[n] for n in sorted(bins[place])] for place in sorted(full, key=lambda p: (-by_place[p], p))]


def _pack(families: list[_Family], rows: Sequence[Row]) -> MicroBatch:
    line, place, paths, starts = [], [], [], [0]
    positions, targets, behaviour, advantage, weight, fresh = [], [], [], [], [], []
    before: NDArray[np.int32] = np.zeros(0, np.int32)
    path: Ids = np.zeros(0, np.int64)
    for family in families:
        tokens = rows[family.rows[0]].tokens
        shared = min(_common(before, tokens), len(tokens) - 1)
        shared = shared if shared >= MIN_SHARED else 0
        own = len(tokens) - shared
        path = np.concatenate([path[:shared], np.arange(starts[-1], starts[-1] + own)])
        line.append(tokens[shared:])
        place.append(np.arange(shared, len(tokens)))
        paths.append(path)
        starts.append(starts[-1] + own)
        before = tokens
        for number in family.rows:
            row = rows[number]
            last = len(row.tokens)
            first = last - row.response_tokens
            positions.append(path[first - 1 : last - 1])
            targets.append(tokens[first:last])
            behaviour.append(row.logprobs)
            advantage.append(np.full(row.response_tokens, row.advantage))
            weight.append(np.full(row.response_tokens, row.counts))
            fresh.append(np.zeros(row.response_tokens, np.bool_) if row.fresh is None else row.fresh)
    return MicroBatch(
        input_ids=np.concatenate(line).astype(np.int64)[None],
        position_ids=np.concatenate(place).astype(np.int64)[None],
        starts=np.array(starts, dtype=np.int64),
        path_starts=np.cumsum([0, *map(len, paths)], dtype=np.int64),
        path=np.concatenate(paths),
        positions=np.concatenate(positions).astype(np.int64),
        targets=np.concatenate(targets).astype(np.int64),
        behaviour=np.concatenate(behaviour).astype(np.float32),
        advantage=np.concatenate(advantage).astype(np.float32),
        weight=np.concatenate(weight).astype(np.float32),
        fresh=np.concatenate(fresh).astype(np.float32),
        sequence=np.repeat(np.arange(len(targets)), [len(some) for some in targets]),
        tokens=starts[-1],
        widest=sum(map(len, targets)),
    )
