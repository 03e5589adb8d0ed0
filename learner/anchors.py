"""Anchor grouping: which steps of a group were taken in the same state (GiGPO, arXiv:2505.10978, eq. 6).

Invariants
- A step group never spans two groups.
- Step groups are numbered from 0 in order of first appearance, so equal input gives equal output.
- With a similarity threshold the clusters are greedy and depend on row order: a step joins the first cluster whose
  first member it resembles, as in the published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]


def step_groups(group: Ids, anchors: Sequence[str], similarity: float | None = None) -> Ids:
    """Assign each row to a step group.

    Args:
        group: int64 [N], group of each row.
        anchors: N anchor keys.
        similarity: smallest SequenceMatcher ratio at which two anchors count as the same; None: equal keys only.

    Returns:
        int64 [N], step group of each row, from 0 in order of first appearance.

    Raises:
        ValueError: `group` and `anchors` differ in length.

    Example: two groups of three steps; the state `desk` occurs in both, and twice in the first.

        group    0     0      0     1     1      1
        anchors  desk  shelf  desk  desk  stove  sink
        result   0     1      0     2     3      4
    """
    if len(group) != len(anchors):
        raise ValueError(f"{len(group)} rows but {len(anchors)} anchors")
    keys = dense_ids(anchors) if similarity is None else _clusters(group, anchors, similarity)
    return joint_ids(group, keys)


def final_states(
    group: Ids, anchors: Sequence[str], of_final: Ids, finals: Sequence[str | None], similarity: float | None = None
) -> tuple[Ids, Ids]:
    """Assign rows to step groups as `step_groups` does, and say in which of them episodes ended.

    Args:
        group: int64 [N], group of each row.
        anchors: N anchor keys.
        of_final: int64 [E], group of each episode.
        finals: E keys of the states that the episodes' last actions led to; None: not known.
        similarity: as for `step_groups`.

    Returns:
        int64 [N], as `step_groups`; int64 [E], the state of each end: a step group, or a further number for a state
        that nobody acted in; −1: not known.
    """
    known = np.array([final is not None for final in finals], dtype=np.bool_)
    texts = [final for final in finals if final is not None]
    # After all rows, so that the rows are numbered as without them.
    ids = step_groups(np.concatenate([group, of_final[known]]), [*anchors, *texts], similarity)
    ends = np.full(len(finals), -1, dtype=np.int64)
    ends[known] = ids[len(group) :]
    return ids[: len(group)], ends


def graph_nodes(
    group: Ids, anchors: Sequence[str], last: Flags, finals: Sequence[str | None], similarity: float
) -> tuple[Ids, Ids]:
    """Merge similar states in the order of play, and say where each row began and where it led.

    Args:
        group: int64 [N], group of each row; rows in the order of play, episode after episode.
        anchors: N anchor keys.
        last: bool [N], the row is its episode's last.
        finals: for each episode the key of the state that its last action led to; None: not known.
        similarity: see `step_groups`.

    Returns:
        int64 [N] twice: the node of the row's state, and of the state it led to; −1: not known.

    Example: an episode with anchors A B that ended in A, then one with anchor C whose end is not known.

        texts    A  B  A  C        in the order in which they may open a cluster
        state    0  1     2
        next     1  0     −1
    """
    texts, owners, places = list[str](), list[int](), list[int]()
    ends = iter(finals)
    for anchor, owner, is_last in zip(anchors, group.tolist(), last.tolist(), strict=True):
        places.append(len(texts))
        final = next(ends) if is_last else None
        own = [anchor] if final is None else [anchor, final]
        texts += own
        owners += [owner] * len(own)
    nodes = np.append(step_groups(np.array(owners, dtype=np.int64), texts, similarity), -1)
    place = np.array(places, dtype=np.int64)
    has_end = np.array([final is not None for final in finals], dtype=np.bool_)
    leads_on = ~last
    leads_on[last] = has_end
    return nodes[place], np.where(leads_on, nodes[place + 1], -1)


def dense_ids(keys: Sequence[object]) -> Ids:
    """Number keys from 0 in order of first appearance; equal keys get equal ids. Returns int64 [N].

    Example: `["b", "a", "b"]` gives `[0, 1, 0]`.
    """
    ids = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.fromiter(map(ids.__getitem__, keys), dtype=np.int64, count=len(keys))


def joint_ids(first: Ids, second: Ids) -> Ids:
    """Number pairs of ids from 0 in order of first appearance; rows that agree in both get equal ids.

    Args:
        first: int64 [N].
        second: int64 [N].

    Returns:
        int64 [N].

    Example: `first` 3 3 5 3 and `second` 7 8 7 7 become the codes 0 1 4 0 (`first` counts in steps of the width of
    `second`'s range, here 2), which np.unique sorts and the order of first appearance numbers as 0 1 2 0.
    """
    if not len(first):
        return np.zeros(0, dtype=np.int64)
    # One integer for each pair, so that one sort finds equal pairs.
    low = second.min()
    codes = (first - first.min()) * (int(second.max() - low) + 1) + (second - low)
    _, appears, inverse = np.unique(codes, return_index=True, return_inverse=True)
    rank = np.empty(len(appears), dtype=np.int64)
    rank[np.argsort(appears)] = np.arange(len(appears))
    return rank[inverse]


def _clusters(group: Ids, anchors: Sequence[str], similarity: float) -> Ids:
    """Cluster anchors greedily, numbered within each group. Returns int64 [N].

    Example: one group, similarity 0.8. `a b c d e` opens cluster 0; `a b c d f` resembles its first member (ratio
    0.89) and joins; `a b c x f` resembles only the second member (0.89; 0.78 to the first) and opens cluster 1.
    """
    representatives: dict[int, list[SequenceMatcher[str]]] = {}
    known: dict[tuple[int, str], int] = {}
    out = np.empty(len(anchors), dtype=np.int64)
    # Anchors repeat within a group, and a ratio takes quadratic time: each distinct one is placed once.
    for row, (member_of, anchor) in enumerate(zip(group.tolist(), anchors, strict=True)):
        cluster = known.get((member_of, anchor))
        if cluster is None:
            cluster = _place(anchor, representatives.setdefault(member_of, []), similarity)
            known[member_of, anchor] = cluster
        out[row] = cluster
    return out


def _place(anchor: str, representatives: list[SequenceMatcher[str]], similarity: float) -> int:
    """Number of the first cluster whose first member `anchor` resembles; a new cluster if there is none."""
    for number, matcher in enumerate(representatives):
        matcher.set_seq1(anchor)
        # The quick ratios are upper bounds of the ratio: most pairs are told apart by the first, in constant time.
        if (
            matcher.real_quick_ratio() >= similarity
            and matcher.quick_ratio() >= similarity
            and matcher.ratio() >= similarity
        ):
            return number
    representatives.append(SequenceMatcher(None, "", anchor))
    return len(representatives) - 1
