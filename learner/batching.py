"""Pack rows into micro-batches: what each rank runs through the model, and in which order.

    rows ── _families ──▶ sequences ── _units ──▶ neighbours ── _bins ──▶ forward passes ── _pack ──▶ MicroBatch

Invariants
- Deterministic: the plan is a function of the rows, the number of ranks and the token budget.
- A forward pass is one line of tokens without padding, within the budget (a longer single row goes alone).
- Every rank runs the same number of forward passes, because collectives require it, of nearly the same length; a rank
  that is short of work repeats a batch with weight 0.
- A token is computed once for all rows of a line that begin with the same tokens up to it: under causal attention its
  hidden state is the same in all of them. Each row keeps its own loss. An episode whose prompts continue one another is
  thus one sequence, and the episodes of a group share their beginning.
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
sequence and the rows that are prefixes of it. `nothing`: it holds one row."""

MIN_SHARED = 32
"""Tokens. Shorter common prefixes are recomputed: cheaper than gathering keys and values from another sequence."""
UNITS_PER_BATCH = 2
"""Pack in units of at most `budget / UNITS_PER_BATCH` tokens: smaller units balance better and share less."""


@dataclass(frozen=True, slots=True)
class Row:
    """One step as the learner trains on it.

    Attributes:
        tokens: int32 [P + R], prompt then response.
        logprobs: float32 [R], log-probabilities (nats) of the response under the sampler.
        advantage: of every response token.
        counts: whether its tokens are trained on; otherwise they only fill a batch.
        fresh: bool [R], whether the version being updated sampled the token; None: none of them.
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
        input_ids: int64 [1, L], tokens of the line.
        position_ids: int64 [1, L], position of each token in its own sequence.
        starts: int64 [S + 1], bounds of the sequences' own tokens, see `learner.rank.attention.Layout`.
        path_starts: int64 [S + 1], bounds of the sequences' paths in `path`.
        path: int64, places in the line of the tokens that each sequence reads.
        positions: int64 [T], place in the line of the token that predicts each response token.
        targets: int64 [T], the response tokens.
        behaviour: float32 [T], the sampler's log-probabilities (nats).
        advantage: float32 [T].
        weight: float32 [T], 1 or 0.
        fresh: float32 [T], 1 where the version being updated sampled the token, else 0.
        sequence: int64 [T], row of each response token, numbered within the micro-batch.
        tokens: L, or 0 in a batch that only fills a rank's pass.
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
    """Rows that one sequence holds: a row, and rows that are prefixes of it.

    Attributes:
        rows: numbers of the rows, the longest first; it is the sequence.
        length: tokens of the sequence.
        shared: leading tokens in common with the family before.
    """

    rows: list[int]
    length: int
    shared: int


def plan(rows: Sequence[Row], ranks: int, budget: int, sharing: Sharing = "lines") -> list[list[MicroBatch]]:
    """Plan the micro-batches of each rank.

    Args:
        rows: at least one.
        ranks: number of ranks.
        budget: most tokens in a line of several sequences.
        sharing: what rows may share.

    Returns:
        For each rank its micro-batches in order, equally many.

    Raises:
        ValueError: there are no rows.

    Example: five passes of 9, 8, 7, 5 and 4 tokens on two ranks. Each column runs at the same time; the order of the
    ranks alternates, so that the longer pass of a pair goes to each in turn. `fill` repeats the last pass, weight 0.

        rank 0   9  5  4
        rank 1   8  7  fill     pairs in order of length: (9 8), then reversed (7 5), then (4 fill)
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
        # Back and forth over passes sorted by length: passes that run together are nearly even, and so are the sums.
        for own, batch in zip(shares if number // ranks % 2 == 0 else reversed(shares), together, strict=True):
            own.append(batch)
    return shares


def _families(rows: Sequence[Row]) -> list[_Family]:
    """Group rows into sequences, in the lexicographic order of their tokens.

    In that order a row comes right before those it is a prefix of, and each sequence next to those with which it has
    most in common. So one walk from the end finds the families, and one from the start what neighbours share.

    Example: rows as letters. Walking backwards, `abc` is a prefix of `abcde` and joins it; `ab` too.

        rows       0 abcde   1 ab   2 abx   3 abc
        sorted     ab, abc, abcde, abx
        families   rows 0 3 1 (length 5, shared 0), row 2 (length 3, shared 2 with `abcde`)
    """
    # Big-endian bytes sort, and have prefixes, as the token ids do.
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
    """Length of the common prefix."""
    size = min(len(one), len(other))
    differs = one[:size] != other[:size]
    return int(differs.argmax()) if differs.any() else size


def _units(families: list[_Family], limit: int) -> list[list[_Family]]:
    """Join neighbours that share a prefix into units of at most `limit` tokens; a longer family is its own unit.

    Example: limit 100; families of 60, 50 (40 shared) and 90 (45 shared) tokens. The second adds 10 to the first's 60;
    the third would add 45, 115 in all, so it opens a unit, in which its shared tokens are computed again: 90.
    """
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
    """Tokens of a unit: the first family in full, of the others what they do not share with the one before."""
    return unit[0].length + sum(family.length - family.shared for family in unit[1:])


def _bins(units: list[list[_Family]], ranks: int, budget: int) -> list[list[list[_Family]]]:
    """Distribute units over forward passes: as few passes a rank as fit the budget, nearly equally long.

    Longest unit first into the emptiest pass (LPT; Graham, SIAM J. Appl. Math. 17, 1969), whose fullest pass is at most
    a third longer than that of the best distribution.

    Args:
        units: of families.
        ranks: number of ranks; passes come in multiples of it.
        budget: most tokens of a pass of several units.

    Returns:
        Units of each pass in their original order, longest pass first.

    Example: sizes 7 6 5 4 on one rank, budget 12. Two passes could hold 22 <= 24 tokens:

        7 -> pass 0 (7)      6 -> pass 1 (6)      5 -> pass 1 (11)      4 -> pass 0 (11)
    """
    sizes = [_size(unit) for unit in units]
    order = sorted(range(len(units)), key=lambda number: (-sizes[number], number))
    passes = max(1, -(-sum(sizes) // (ranks * budget)))  # fewer cannot hold them; more are tried below
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
    """Lay the sequences of one forward pass out in a line.

    Example, with a MIN_SHARED of 2: sequence A is `a b c d e`, of which row 0 predicts `d e` and row 1, its prefix
    `a b c`, predicts `c`. Sequence B is `a b c x y` and shares `a b c` with A; its row 2 predicts `x y`.

        place in the line   0 1 2 3 4 | 5 6
        token               a b c d e | x y       A's own tokens, then only B's own
        position_ids        0 1 2 3 4 | 3 4
        starts              0 5 7
        path                0 1 2 3 4 | 0 1 2 5 6     B reads A's `a b c`, then itself
        path_starts         0 5 10
        row                 0: d e   1: c    2: x y
        positions           2 3      1       2 5      the place before each target, along the path
        targets             d e      c       x y
        sequence            0 0      1       2 2
    """
    line, place, paths, starts = [], [], [], [0]
    positions, targets, behaviour, advantage, weight, fresh = [], [], [], [], [], []
    before: NDArray[np.int32] = np.zeros(0, np.int32)
    path: Ids = np.zeros(0, np.int64)
    for family in families:
        tokens = rows[family.rows[0]].tokens
        # At least one token of its own: the attention kernels take no empty sequence.
        shared = min(_common(before, tokens), len(tokens) - 1)
        shared = shared if shared >= MIN_SHARED else 0
        own = len(tokens) - shared
        # Along the path of the sequence before, not its own tokens: that one may itself share with one before it.
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
