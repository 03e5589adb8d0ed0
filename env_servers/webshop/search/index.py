"""Search index: the best documents for a bag of words, in Lucene's order.

Invariants
- Scores are those of `similarity`, summed in double precision and rounded to single, like Lucene; documents with equal
  scores are sorted by asin.
- An index is read-only and a search leaves no state in it: threads and processes may share it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from env_servers.webshop.search import similarity, storage
from env_servers.webshop.search.analysis import analyze
from env_servers.webshop.search.postings import Postings, PostingsBuilder, collect

_BLOCK = 512

Documents = Iterable[tuple[str, str]]
"""(asin, text) of each document, in any order."""


class Hit(NamedTuple):
    """A document found by a search."""

    asin: str
    score: float


def build(documents: Documents, folder: Path, source: str = "") -> None:
    """Write an index to a new folder. Documents are read one by one and need not fit in memory.

    Args:
        documents: the documents to index.
        folder: must not exist yet.
        source: identifies the documents, such as a checksum of their file; `SearchIndex.open` compares it.

    Raises:
        SearchIndexError: the folder exists or is not writable, or the documents cannot be indexed.
    """
    with storage.new_folder(folder) as partial_folder:
        with TemporaryDirectory(prefix="runs-", dir=partial_folder) as runs:
            builder = PostingsBuilder(storage.RunFolder(Path(runs)).keep)
            _add(builder, documents)
            builder.write(partial(storage.allocate_in, partial_folder))
        storage.seal(partial_folder, source)


class SearchIndex:
    """A searchable set of documents."""

    def __init__(self, postings: Postings) -> None:
        self._postings = postings
        self._term_text = postings.term_text.data
        self._documents_with_terms = int(np.count_nonzero(postings.lengths))

    @classmethod
    def open(cls, folder: Path, source: str | None = None) -> SearchIndex:
        """Open an index written by `build`, memory-mapped. If `source` is given, the index must have the same one.

        Raises:
            SearchIndexError: the folder holds no index of this version and source, or the index is damaged.
        """
        return cls(storage.load(folder, source))

    @classmethod
    def build_in_memory(cls, documents: Documents) -> SearchIndex:
        """Build an index of a small set of documents. Raises SearchIndexError if they cannot be indexed."""
        builder = PostingsBuilder()
        _add(builder, documents)
        allocate, collected = collect()
        builder.write(allocate)
        return cls(collected())

    def __len__(self) -> int:
        return len(self._postings.asins)

    def search(self, query: str, k: int = 50) -> list[str]:
        """Return the asins of the k best documents, best first; only documents with a term of the query."""
        return [hit.asin for hit in self.hits(query, k)]

    def hits(self, query: str, k: int = 50) -> list[Hit]:
        """Return the k best documents with their scores, best first.

        Example:
            index = SearchIndex.build_in_memory([("B2", "Red socks, red laces"), ("B1", "Blue socks")])
            index.hits("red socks")  # [Hit("B2", 0.5493), Hit("B1", 0.1024)]: only B2 has `red`
            index.hits("socks")      # [Hit("B1", 0.1024), Hit("B2", 0.0903)]: B1 is shorter
        """
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        scores = self._scores(query)
        found = _best(scores, k)
        asins = self._postings.asins[found]
        return [Hit(asin.decode(), float(np.float32(score))) for asin, score in zip(asins, scores[found], strict=True)]

    def _scores(self, query: str) -> NDArray[np.float64]:
        """Return the score of every document: float64 [N, zero-padded to a multiple of `_BLOCK`]."""
        postings = self._postings
        scores = np.zeros(-(-len(self) // _BLOCK) * _BLOCK)
        for term, repeats in Counter(analyze(query)).items():
            row = self._row(term.encode())
            if row is None:
                continue
            start, count = int(postings.starts[row]), int(postings.counts[row])
            weight = similarity.weight(count, self._documents_with_terms, repeats)
            documents = postings.documents[start : start + count].astype(np.intp)
            scores[documents] += weight - weight / postings.saturations[start : start + count]
        return scores

    def _row(self, term: bytes) -> int | None:
        """Return the row of a term, or None if no document has it."""
        row = bisect_left(range(len(self._postings.starts)), term, key=self._term)
        return row if row < len(self._postings.starts) and self._term(row) == term else None

    def _term(self, row: int) -> bytes:
        ends = self._postings.term_ends
        return bytes(self._term_text[ends[row - 1] if row else 0 : ends[row]])


def _best(scores: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """Return the k best documents with a positive score, best first, compared in single precision.

    Each of the k best blocks holds a document at least as good as the k-th best block maximum. That maximum is
    therefore a lower bound of the k-th best score, and only scores at or above it have to be sorted.

    Example:
        blocks of 2, k = 2: scores [3 1 | 0 5 | 2 4], maxima [3, 5, 4], bound 4: only 5 and 4 are sorted
    """
    maxima = scores.reshape(-1, _BLOCK).max(axis=1)
    bound = np.float32(np.partition(maxima, -k)[-k] if len(maxima) >= k else 0)
    found = np.flatnonzero(scores > np.nextafter(bound, np.float32(0)))
    return found[np.argsort(-scores[found].astype(np.float32), kind="stable")[:k]]


def _add(builder: PostingsBuilder, documents: Documents) -> None:
    for asin, text in documents:
        builder.add(asin, text)
