from difflib import SequenceMatcher

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.anchors import step_groups

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


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 rows but 1 anchors"):
        step_groups(np.zeros(2, dtype=np.int64), ["a"])
