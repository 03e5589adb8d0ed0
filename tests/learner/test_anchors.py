from difflib import SequenceMatcher

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.anchors import final_states, graph_nodes, step_groups

rows = st.lists(st.tuples(st.integers(0, 3), st.text("ab ", max_size=6)), max_size=40)


def split(pairs):
    return np.array([group for group, _ in pairs], dtype=np.int64), [anchor for _, anchor in pairs]


@settings(max_examples=2000)
@given(rows)
def test_exact_keys_partition_rows_by_group_and_anchor(pairs):
    ours = step_groups(*split(pairs))
    seen = list(dict.fromkeys(pairs))
    assert ours.tolist() == [seen.index(pair) for pair in pairs]


@settings(max_examples=2000)
@given(rows, st.sampled_from([0.5, 0.8, 1.0]))
def test_similar_anchors_join_the_first_cluster_whose_representative_they_resemble(pairs, threshold):
    clusters: list[tuple[int, str]] = []
    expected = []
    for group, anchor in pairs:
        for number, (owner, representative) in enumerate(clusters):
            if owner == group and SequenceMatcher(None, anchor, representative).ratio() >= threshold:
                expected.append(number)
                break
        else:
            expected.append(len(clusters))
            clusters.append((group, anchor))
    assert step_groups(*split(pairs), threshold).tolist() == expected


def test_ends_are_states_of_their_group_or_further_ones():
    group, anchors = np.array([0, 0, 1, 1]), ["desk", "shelf", "desk", "stove"]
    ends = np.array([0, 0, 1, 1])
    ids, final = final_states(group, anchors, ends, ["shelf", "sink", "shelf", None])
    assert ids.tolist() == step_groups(group, anchors).tolist() == [0, 1, 2, 3]
    assert final.tolist() == [1, 4, 5, -1]


@given(rows, st.lists(st.none() | st.text("ab ", max_size=6), min_size=40, max_size=40), st.sampled_from([0.5, 0.8]))
def test_graph_nodes_are_clusters_in_the_order_of_play(pairs, finals, threshold):
    """Each row is an episode's last where the next one is of another group; against clusters of all texts in order."""
    pairs = sorted(pairs, key=lambda pair: pair[0])
    group, anchors = split(pairs)
    last = np.append(group[1:] != group[:-1], True)[: len(group)]
    ends = finals[: int(last.sum())]
    state, after = graph_nodes(group, anchors, last, ends, threshold)
    texts, expected = [], []
    left = iter(ends)
    for (owner, anchor), is_last in zip(pairs, last, strict=True):
        texts.append((owner, anchor))
        expected.append((len(texts) - 1, None))
        if is_last and (final := next(left)) is not None:
            texts.append((owner, final))
            expected[-1] = (len(texts) - 2, len(texts) - 1)
    ids = step_groups(*split(texts), threshold)
    assert state.tolist() == [ids[place] for place, _ in expected]
    for row, (_, end) in enumerate(expected):
        if not last[row]:
            assert after[row] == state[row + 1]
        else:
            assert after[row] == (-1 if end is None else ids[end])


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 rows but 1 anchors"):
        step_groups(np.zeros(2, dtype=np.int64), ["a"])
