"""Searches an index: the best documents of a bag of words, in Lucene's order.

Invariants
- Scores are those of `similarity`, summed in double precision and rounded to single, as Lucene does; equal scores are
  in ascending order of the asin.
- An index is read-only and holds no state of a search: threads and processes may share it.
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
    """A document that was found."""

    asin: str
    score: float


def build(documents: Documents, folder: Path, source: str = "") -> None:
    """Write an index to a new folder. Documents are taken one by one and may be more than memory holds.

    `source` is recorded and stands for the documents: a checksum of their file, say.

    Raises:
        SearchIndexError: the folder is there already or cannot be written, or the documents cannot be indexed.
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
        """An index that `build` wrote, memory-mapped; of the same `source` where one is given.

        Raises:
            SearchIndexError: there is no index of this version and source in the folder, or it is damaged.
        """
        return cls(storage.load(folder, source))

    @classmethod
    def build_in_memory(cls, documents: Documents) -> SearchIndex:
        """An index of a small set of documents; raises SearchIndexError where they cannot be indexed."""
        builder = PostingsBuilder()
        _add(builder, documents)
        allocate, collected = collect()
        builder.write(allocate)
        return cls(collected())

    def __len__(self) -> int:
        return len(self._postings.asins)

    def search(self, query: str, k: int = 50) -> list[str]:
        """The asins of the k best documents (fewer where fewer have a term of the query), best first."""
        return [hit.asin for hit in self.hits(query, k)]

    def hits(self, query: str, k: int = 50) -> list[Hit]:
        """As `search`, with scores."""
        if k < 1:
            raise ValueError(f"a search gives at least one document, not {k}")
        scores = self._scores(query)
        found = _best(scores, k)
        asins = self._postings.asins[found]
        return [Hit(asin.decode(), float(np.float32(score))) for asin, score in zip(asins, scores[found], strict=True)]

    def _scores(self, query: str) -> NDArray[np.float64]:
        """[N, padded with zeros to whole blocks] the score of every document."""
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
        """The place of a term among the terms."""
        row = bisect_left(range(len(self._postings.starts)), term, key=self._term)
        return row if row < len(self._postings.starts) and self._term(row) == term else None

    def _term(self, row: int) -> bytes:
        ends = self._postings.term_ends
        return bytes(self._term_text[ends[row - 1] if row else 0 : ends[row]])


def _best(scores: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """The k best documents with a positive score, best first; scores count in single precision.

    The k-th best block's maximum is a lower bound of the k-th best score that costs no sorting of all scores.
    """
    maxima = scores.reshape(-1, _BLOCK).max(axis=1)
    bound = np.float32(np.partition(maxima, -k)[-k] if len(maxima) >= k else 0)
    found = np.flatnonzero(scores > np.nextafter(bound, np.float32(0)))
    return found[np.argsort(-scores[found].astype(np.float32), kind="stable")[:k]]


def _add(builder: PostingsBuilder, documents: Documents) -> None:
    for asin, text in documents:
        builder.add(asin, text)
