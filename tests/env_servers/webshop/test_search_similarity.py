"""Lucene's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from env_servers.webshop.search import similarity


@given(st.integers(0, 2**31 - 1))
def test_lengths_keep_four_significant_bits_above_23(length: int) -> None:
    surplus = length - 24
    shift = max(surplus.bit_length() - 4, 0)
    rounded = length if surplus < 0 else 24 + (surplus >> shift << shift)
    assert similarity.LENGTHS[similarity.round_lengths(np.array([length]))] == [rounded]


def test_lengths_end_where_an_integer_does() -> None:
    assert len(similarity.LENGTHS) == 256
    assert list(similarity.LENGTHS[:26]) == list(range(26))
    assert similarity.LENGTHS[-1] == 24 + (15 << 27)


def test_scores_are_of_single_precision() -> None:
    inverse = similarity.inverse_norms(np.float32(107.5))
    divisor = similarity.saturation(np.array([1, 2, 100]), inverse[[0, 100, 255]])
    weight = similarity.weight(3, 1000, repeats=2)
    assert inverse.dtype == divisor.dtype == np.dtype(np.float32)
    assert isinstance(weight, np.float32)
    assert weight == pytest.approx(2 * np.log(1 + 997.5 / 3.5), rel=1e-6)
    assert divisor[0] == pytest.approx(1 + 1 / (0.9 * 0.6), rel=1e-6)
