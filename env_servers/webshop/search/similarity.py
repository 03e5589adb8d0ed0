"""Lucene's BM25 in Lucene's arithmetic: single precision, with document lengths rounded down to one of 256 values.

The score of a term in a document is `weight - weight / saturation(frequency, length)`, in exactly that form and
precision. Mathematically equal formulas round differently, so they give other ties and another order.

Example:
    A term in 3 of 100 documents has weight(3, 100) = 3.3624. Documents have 40 terms on average; this one has 41, which
    counts as 40: inverse_norms(40) is 1.1111 there.

    frequency     1       2       5
    saturation    2.1111  3.2222  6.5556
    score         1.7697  2.3189  2.8495
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

K1 = np.float32(0.9)
B = np.float32(0.4)
_EXACT = 24
"""Codes below this are the length itself; later codes keep four significant bits of the rest."""


def _length(code: int) -> int:
    """Decode Lucene's one-byte length: a small float with three stored bits and an implicit leading one."""
    if code < _EXACT:
        return code
    shift, bits = divmod(code - _EXACT, 8)
    return _EXACT + (bits if shift == 0 else (bits | 8) << (shift - 1))


LENGTHS: NDArray[np.int64] = np.array([_length(code) for code in range(256)])
"""[256] every length that an index can store, ascending, from 0 to 2,013,265,944."""


def round_lengths(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index in `LENGTHS` of each length, rounded down.

    Example:
        LENGTHS[round_lengths(np.array([10, 32, 41, 47, 48, 1000]))]  # [10, 32, 40, 46, 48, 984]
    """
    return LENGTHS.searchsorted(lengths, side="right") - 1


def inverse_norms(average: np.float32) -> NDArray[np.float32]:
    """Return [256] the factor of a term's frequency for each of `LENGTHS`; `average` is the mean document length."""
    one = np.float32(1)
    return one / (K1 * ((one - B) + B * LENGTHS.astype(np.float32) / average))


def saturation(frequencies: NDArray[np.int64], inverse: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the divisor of the weight for each frequency of a term in a document, element-wise."""
    return np.float32(1) + frequencies.astype(np.float32) * inverse


def weight(documents_with_term: int, documents: int, repeats: int = 1) -> np.float32:
    """Return the weight of a term that is `repeats` times in the query: `repeats` × inverse document frequency."""
    rarity = math.log(1 + (documents - documents_with_term + 0.5) / (documents_with_term + 0.5))
    return np.float32(repeats) * np.float32(rarity)
