"""Turns a stream of documents into the arrays of an index.

Documents are collected into sorted runs of packed (term, document, frequency) postings, which may be stored on disk. At
the end the runs are merged, one range of terms at a time: memory depends on the vocabulary, not on the amount of text.

Invariants
- Documents are numbered by ascending asin, whatever the order of arrival: on equal scores the lower number comes first.
- The postings of a term are sorted by document.

Example:
    "B2": "Red socks, red laces" and "B1": "Blue socks", in this order of arrival.

    terms in order of first appearance    red 0, sock 1, lace 2, blue 3
    the run, (term, document, frequency)  (0,0,2) (1,0,1) (1,1,1) (2,0,1) (3,1,1), packed 0x2, 0x10000000001, …
    asins                                 B1 B2: document 0 is now B1
    lengths                               2 4
    term_text, term_ends                  bluelaceredsock, 4 8 11 15
    starts, counts                        4 3 0 1, 1 1 1 2: the postings stay in order of first appearance
    documents                             1 | 0 1 | 1 | 0
    saturations                           2.96 | 2.28 1.98 | 1.98 | 2.28
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from env_servers.webshop.search import similarity
from env_servers.webshop.search.analysis import term
from env_servers.webshop.search.words import words

LONGEST_ASIN = 64
"""In bytes."""

_TERM, _DOCUMENT = 40, 16
"""Bit offsets in a packed posting: 24 bits for the term, 24 for the document, the lowest 16 for the frequency."""
_MOST = 1 << 24
_MOST_OFTEN = (1 << 16) - 1
_RUN_WORDS = 1 << 22
_MERGED_POSTINGS = 1 << 23
_STOP = -1

Packed = NDArray[np.uint64]
Allocate = Callable[[str, "np.dtype[Any]", int], "NDArray[Any]"]
"""(name, dtype, length) → the array to fill."""


class SearchIndexError(Exception):
    """An index cannot be built or opened. The message is one line and says what to do."""


@dataclass(frozen=True)
class Postings:
    """The arrays of an index with N documents, T terms and P postings."""

    asins: NDArray[np.bytes_]
    """[N] UTF-8, ascending; the position is the document's number."""
    lengths: NDArray[np.int32]
    """[N] number of terms in the document, with repetitions."""
    term_text: NDArray[np.uint8]
    """All terms in UTF-8, ascending, concatenated."""
    term_ends: NDArray[np.int64]
    """[T] end of each term in `term_text`."""
    starts: NDArray[np.int64]
    """[T] first posting of each term."""
    counts: NDArray[np.int64]
    """[T] number of postings of each term: the documents that contain it."""
    documents: NDArray[np.int32]
    """[P] document of each posting."""
    saturations: NDArray[np.float32]
    """[P] divisor of the term's weight; see `similarity`."""


TYPES: Mapping[str, str] = {
    "asins": "S",
    "lengths": "<i4",
    "term_text": "|u1",
    "term_ends": "<i8",
    "starts": "<i8",
    "counts": "<i8",
    "documents": "<i4",
    "saturations": "<f4",
}
"""Type of each array; asins are as wide as the longest one."""
assert list(TYPES) == [field.name for field in fields(Postings)]


class _TermNumbers(dict[str, int]):
    """Word → number of its term, in order of first appearance; `_STOP` for a stop word."""

    def __init__(self) -> None:
        self.terms: dict[str, int] = {}

    def __missing__(self, word: str) -> int:
        found = term(word)
        number = self.terms.setdefault(found, len(self.terms)) if found else _STOP
        self[word] = number
        return number


class PostingsBuilder:
    """Collects documents one by one. `keep` may store a run on disk and return it memory-mapped."""

    def __init__(self, keep: Callable[[Packed], Packed] = lambda run: run) -> None:
        self._keep = keep
        self._numbers = _TermNumbers()
        self._asins: list[bytes] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._runs: list[Packed] = []
        self._run = array("i")
        self._run_words = array("q")

    def add(self, asin: str, text: str) -> None:
        """Add a document.

        Raises:
            SearchIndexError: invalid asin, or too many documents or terms.
        """
        key = asin.encode()
        if not 0 < len(key) <= LONGEST_ASIN or b"\0" in key:
            raise SearchIndexError(f"invalid asin {asin[:80]!r}: it must have 1 to {LONGEST_ASIN} bytes and no NUL")
        found = list(map(self._numbers.__getitem__, words(text)))
        self._asins.append(key)
        self._run.extend(found)
        self._run_words.append(len(found))
        if len(self._asins) > _MOST or len(self._numbers.terms) > _MOST:
            raise SearchIndexError(f"too many documents or terms: an index holds at most {_MOST:,} of each")
        if len(self._run) >= _RUN_WORDS:
            self._end_run()

    def _end_run(self) -> None:
        """Turn the words collected since the last run into a sorted run of packed postings."""
        terms = np.array(self._run, dtype=np.int64)
        documents = np.repeat(np.arange(len(self._run_words)), np.array(self._run_words, dtype=np.int64))
        counted = terms != _STOP
        terms, documents = terms[counted], documents[counted]
        first = len(self._asins) - len(self._run_words)
        self._lengths.append(np.bincount(documents, minlength=len(self._run_words)))
        keys = (terms << _TERM | (documents + first) << _DOCUMENT).view(np.uint64)
        postings, repeats = np.unique(keys, return_counts=True)
        frequencies: Packed = np.minimum(repeats, _MOST_OFTEN).astype(np.uint64)
        self._runs.append(self._keep(postings | frequencies))
        self._run, self._run_words = array("i"), array("q")

    def write(self, allocate: Allocate) -> None:
        """Fill the arrays of `Postings`. No document may be added afterwards.

        Raises:
            SearchIndexError: there are no documents, they have no terms, or two have the same asin.
        """
        self._end_run()
        if not self._numbers.terms:
            raise SearchIndexError("nothing to index: no document has a word other than stop words")
        asins, order = self._ordered_asins()
        lengths = np.concatenate(self._lengths)
        counts = self._counts()
        starts = np.cumsum(counts) - counts
        _put(allocate, "asins", asins)
        _put(allocate, "lengths", lengths[order])
        terms = sorted((text.encode(), number) for text, number in self._numbers.terms.items())
        by_text = np.array([number for _, number in terms])
        _put(allocate, "term_text", np.frombuffer(b"".join(text for text, _ in terms), dtype=np.uint8))
        _put(allocate, "term_ends", np.cumsum([len(text) for text, _ in terms]))
        _put(allocate, "starts", starts[by_text])
        _put(allocate, "counts", counts[by_text])
        self._write_postings(allocate, starts, counts, _ranks(order), lengths[order])

    def _ordered_asins(self) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
        """Return the asins, ascending, and the position of each in the order of arrival."""
        asins = np.array(self._asins)
        order = np.argsort(asins, kind="stable")
        asins = asins[order]
        repeated = np.flatnonzero(asins[1:] == asins[:-1])
        if len(repeated):
            raise SearchIndexError(f"duplicate asin '{asins[repeated[0]].decode()}': each document needs its own")
        return asins, order

    def _counts(self) -> NDArray[np.int64]:
        """Number of postings of each term, in order of first appearance."""
        counts = np.zeros(len(self._numbers.terms), dtype=np.int64)
        for run in self._runs:
            counts += np.bincount((run >> _TERM).astype(np.int64), minlength=len(counts))
        return counts

    def _write_postings(
        self,
        allocate: Allocate,
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        ranks: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> None:
        """Fill `documents` and `saturations`, one range of terms at a time.

        Args:
            allocate: makes the arrays.
            starts: [T] first posting of each term, in order of first appearance.
            counts: [T] postings of each term.
            ranks: [N] order of arrival → document number.
            lengths: [N] terms of each document, by document number.
        """
        total = int(counts.sum())
        documents = allocate("documents", np.dtype(TYPES["documents"]), total)
        saturations = allocate("saturations", np.dtype(TYPES["saturations"]), total)
        # Lucene's average leaves out documents without terms.
        average = np.float32(lengths.sum() / np.count_nonzero(lengths))
        inverse = similarity.inverse_norms(average)[similarity.round_lengths(lengths)]
        at = 0
        for first, last in _ranges(starts, counts):
            merged = self._merge(first, last, ranks)
            ranked = _documents(merged)
            frequencies = (merged & _MOST_OFTEN).astype(np.int64)
            documents[at : at + len(merged)] = ranked
            saturations[at : at + len(merged)] = similarity.saturation(frequencies, inverse[ranked])
            at += len(merged)

    def _merge(self, first: int, last: int, ranks: NDArray[np.int64]) -> Packed:
        """Return the packed postings of terms first to last - 1, with documents renumbered by `ranks`, sorted."""
        ends = np.array([first, last], dtype=np.uint64) << _TERM
        merged = np.concatenate([run[slice(*run.searchsorted(ends))] for run in self._runs])
        renumbered = ranks[_documents(merged)].view(np.uint64) << _DOCUMENT
        return np.sort(merged >> _TERM << _TERM | renumbered | merged & _MOST_OFTEN)


def collect() -> tuple[Allocate, Callable[[], Postings]]:
    """Return an allocator of plain arrays, and a function that returns the filled arrays."""
    arrays: dict[str, NDArray[Any]] = {}

    def allocate(name: str, kind: np.dtype[Any], size: int) -> NDArray[Any]:
        arrays[name] = np.empty(size, kind)
        return arrays[name]

    return allocate, lambda: Postings(**arrays)


def _documents(packed: Packed) -> NDArray[np.int64]:
    """Return the document of each packed posting."""
    return (packed >> _DOCUMENT & (_MOST - 1)).astype(np.int64)


def _put(allocate: Allocate, name: str, values: NDArray[Any]) -> None:
    kind = values.dtype if TYPES[name] == "S" else np.dtype(TYPES[name])
    allocate(name, kind, len(values))[:] = values


def _ranks(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Invert a permutation: [2, 0, 1] becomes [1, 2, 0]."""
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return ranks


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield ranges of terms with at most `_MERGED_POSTINGS` postings each, or of one term with more.

    Example:
        at most 4 postings, counts [3, 1, 2, 5, 1]: (0, 2), (2, 3), (3, 4), (4, 5)
    """
    first = 0
    while first < len(starts):
        last = int((starts + counts).searchsorted(starts[first] + _MERGED_POSTINGS, side="right"))
        last = max(last, first + 1)
        yield first, last
        first = last
