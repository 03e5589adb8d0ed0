"""Lucene's BM25, in Lucene's arithmetic: single precision, and a document's length rounded down to one of 256 values.

The score of a term in a document is `weight - weight / saturation(frequency, length)`, in that form and precision.
Everything else (formulas that are equal on paper) gives other ties, and so another order.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

K1 = np.float32(0.9)
B = np.float32(0.4)
_EXACT = 24
"""Lengths below this are kept; above, four significant bits are."""


def _length(code: int) -> int:
    if code < _EXACT:
        return code
    shift, bits = divmod(code - _EXACT, 8)
    return _EXACT + (bits if shift == 0 else (bits | 8) << (shift - 1))


LENGTHS: NDArray[np.int64] = np.array([_length(code) for code in range(256)])
"""The 256 lengths, ascending."""


def round_lengths(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The index in `LENGTHS` of each length, rounded down."""
    return LENGTHS.searchsorted(lengths, side="right") - 1


def inverse_norms(average: np.float32) -> NDArray[np.float32]:
    """For each of `LENGTHS`, what a frequency is multiplied by; `average` is the mean length of a document."""
    one = np.float32(1)
    return one / (K1 * ((one - B) + B * LENGTHS.astype(np.float32) / average))


def saturation(frequencies: NDArray[np.int64], inverse: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the weight is divided by, for each frequency of a term in a document; element-wise."""
    return np.float32(1) + frequencies.astype(np.float32) * inverse


def weight(documents_with_term: int, documents: int, repeats: int = 1) -> np.float32:
    """The weight of a term that occurs `repeats` times in the query."""
    rarity = math.log(1 + (documents - documents_with_term + 0.5) / (documents_with_term + 0.5))
    return np.float32(repeats) * np.float32(rarity)
