"""Anchor grouping: which steps of a group were taken in the same state (GiGPO, eq. 6).

Invariants
- A step group never spans two groups.
- Step groups are numbered from 0 in order of first appearance, so equal input gives equal output.
- With a similarity threshold the clusters are greedy and depend on row order: a step joins the first cluster whose
  first member it resembles, exactly as the published code does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def step_groups(group: Ids, anchors: Sequence[str], similarity: float | None = None) -> Ids:
    """Number of the step group of every row.

    Args:
        group: int64 [N], group of each row.
        anchors: N anchor keys.
        similarity: smallest SequenceMatcher ratio of two anchors that count as the same; None: exact keys.

    Returns:
        int64 [N], from 0 in order of first appearance.
    """
    if len(group) != len(anchors):
        raise ValueError(f"{len(group)} rows but {len(anchors)} anchors")
    keys = dense_ids(anchors) if similarity is None else _clusters(group, anchors, similarity)
    return joint_ids(group, keys)


def dense_ids(keys: Sequence[object]) -> Ids:
    """int64 [N]: equal keys get equal ids, from 0 in order of first appearance."""
    ids = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.fromiter(map(ids.__getitem__, keys), dtype=np.int64, count=len(keys))


def joint_ids(first: Ids, second: Ids) -> Ids:
    """int64 [N]: rows that agree in both ids get equal ids, from 0 in order of first appearance."""
    if not len(first):
        return np.zeros(0, dtype=np.int64)
    low = second.min()
    codes = (first - first.min()) * (int(second.max() - low) + 1) + (second - low)
    _, appears, inverse = np.unique(codes, return_index=True, return_inverse=True)
    rank = np.empty(len(appears), dtype=np.int64)
    rank[np.argsort(appears)] = np.arange(len(appears))
    return rank[inverse]


def _clusters(group: Ids, anchors: Sequence[str], similarity: float) -> Ids:
    """Greedy clusters, numbered within each group."""
    representatives: dict[int, list[SequenceMatcher[str]]] = {}
    known: dict[tuple[int, str], int] = {}
    out = np.empty(len(anchors), dtype=np.int64)
    for row, (member_of, anchor) in enumerate(zip(group.tolist(), anchors, strict=True)):
        cluster = known.get((member_of, anchor))
        if cluster is None:
            cluster = _place(anchor, representatives.setdefault(member_of, []), similarity)
            known[member_of, anchor] = cluster
        out[row] = cluster
    return out


def _place(anchor: str, representatives: list[SequenceMatcher[str]], similarity: float) -> int:
    for number, matcher in enumerate(representatives):
        matcher.set_seq1(anchor)
        # The two quick ratios are upper bounds of the ratio.
        if (
            matcher.real_quick_ratio() >= similarity
            and matcher.quick_ratio() >= similarity
            and matcher.ratio() >= similarity
        ):
            return number
    representatives.append(SequenceMatcher(None, "", anchor))
    return len(representatives) - 1
