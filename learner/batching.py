"""Rows to micro-batches: what each rank runs through the model, in which order.

Invariants
- Deterministic: the plan is a function of the rows, the number of ranks and the token budget.
- A forward pass holds at most the budget's tokens, padding included (a longer single row goes alone).
- Every rank does the same number of forward passes, as collectives need it: one that is short of work repeats the
  first rank's last batch with weight 0.
- A row whose tokens begin another row's shares that one's forward pass: in causal attention its hidden states are the
  same there. Each row keeps its own loss. An episode whose prompts go on from one another is thus one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Row:
    """One step as the learner trains on it.

    Attributes:
        tokens: int32 [P + R], prompt then response.
        logprobs: float32 [R], of the response under the sampler.
        advantage: of every response token.
    """

    tokens: NDArray[np.int32]
    logprobs: Floats
    advantage: float

    @property
    def response_tokens(self) -> int:
        return len(self.logprobs)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass: B right-padded sequences that hold T response tokens.

    Right padding needs no attention mask: in causal attention no real token sees what comes after it.

    Attributes:
        input_ids: int64 [B, L].
        positions: int64 [T], index into the flattened [B · L] of the position that predicts each response token.
        targets: int64 [T], the response tokens.
        behaviour: float32 [T], the sampler's log-probabilities.
        advantage: float32 [T].
        weight: float32 [T], 1 or 0.
        sequence: int64 [T], number within the micro-batch of the row that each response token belongs to.
        tokens: of the sequences, without padding.
    """

    input_ids: Ids
    positions: Ids
    targets: Ids
    behaviour: Floats
    advantage: Floats
    weight: Floats
    sequence: Ids
    tokens: int


def plan(rows: Sequence[Row], ranks: int, budget: int) -> list[list[MicroBatch]]:
    """Micro-batches of each rank, equally many; `budget` tokens at most in each.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no rows to train on")
    families = _families(rows)
    shares = _deal(families, rows, ranks)
    batches = [[_pack(part, rows) for part in _cut(share, rows, budget)] for share in shares]
    passes = max(len(own) for own in batches)
    filler = replace(batches[0][-1], weight=np.zeros_like(batches[0][-1].weight), tokens=0)
    return [own + [filler] * (passes - len(own)) for own in batches]


def _families(rows: Sequence[Row]) -> list[list[int]]:
    """Numbers of the rows that share a sequence, the one that holds the others first; longest first, ties in row order.

    In lexicographic order a row comes right before those that it begins, so one walk from the end finds them all.
    """
    texts = [row.tokens.astype(">u4").tobytes() for row in rows]
    families: list[list[int]] = []
    for number in sorted(range(len(rows)), key=texts.__getitem__, reverse=True):
        if families and texts[families[-1][0]].startswith(texts[number]):
            families[-1].append(number)
        else:
            families.append([number])
    return sorted(families, key=lambda family: (-len(texts[family[0]]), family[0]))


def _deal(families: list[list[int]], rows: Sequence[Row], ranks: int) -> list[list[list[int]]]:
    """Deal longest first, back and forth (0 1 1 0 0 1 …): each rank gets as many sequences, of nearly equal length."""
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    for number, family in enumerate(families):
        round_, place = divmod(number, ranks)
        shares[place if round_ % 2 == 0 else ranks - 1 - place].append(family)
    return shares


def _cut(share: list[list[int]], rows: Sequence[Row], budget: int) -> Iterator[list[list[int]]]:
    """Consecutive pieces within the budget. Lengths fall, so the first sequence of a piece sets its padded length."""
    start = 0
    while start < len(share):
        size = max(1, budget // len(rows[share[start][0]].tokens))
        yield share[start : start + size]
        start += size


def _pack(families: list[list[int]], rows: Sequence[Row]) -> MicroBatch:
    length = max(len(rows[family[0]].tokens) for family in families)
    input_ids = np.zeros((len(families), length), dtype=np.int64)
    positions, targets, behaviour, advantage = [], [], [], []
    for line, family in enumerate(families):
        tokens = rows[family[0]].tokens
        input_ids[line, : len(tokens)] = tokens
        for number in family:
            row = rows[number]
            last = len(row.tokens)
            first = last - row.response_tokens
            positions.append(np.arange(first - 1, last - 1) + line * length)
            targets.append(tokens[first:last])
            behaviour.append(row.logprobs)
            advantage.append(np.full(row.response_tokens, row.advantage))
    return MicroBatch(
        input_ids=input_ids,
        positions=np.concatenate(positions).astype(np.int64),
        targets=np.concatenate(targets).astype(np.int64),
        behaviour=np.concatenate(behaviour).astype(np.float32),
        advantage=np.concatenate(advantage).astype(np.float32),
        weight=np.ones(len(np.concatenate(targets)), dtype=np.float32),
        sequence=np.repeat(np.arange(len(targets)), [len(some) for some in targets]),
        tokens=sum(len(rows[family[0]].tokens) for family in families),
    )
