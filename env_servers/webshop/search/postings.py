"""Turns a stream of documents into the arrays of an index.

Documents are collected into sorted runs of packed (term, document, frequency), which may be kept on disk; at the end
the runs are merged a range of terms at a time, so that memory is bounded by the vocabulary and not by the text.

Invariants
- Documents are numbered in ascending order of their asin, whatever order they come in: a tie goes to the lower number.
- The postings of a term are in ascending order of the document.
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
"""Bytes."""

_TERM, _DOCUMENT = 40, 16
"""Lowest bit of the term and of the document in a packed posting; the frequency has the lowest 16 bits."""
_MOST = 1 << 24
_MOST_OFTEN = (1 << 16) - 1
_RUN_WORDS = 1 << 22
_MERGED_POSTINGS = 1 << 23
_STOP = -1

Packed = NDArray[np.uint64]
Allocate = Callable[[str, "np.dtype[Any]", int], "NDArray[Any]"]
"""Makes the array of that name, type and length that is to be filled."""


class SearchIndexError(Exception):
    """An index cannot be built or opened; the message is one line and says what to do."""


@dataclass(frozen=True)
class Postings:
    """The arrays of an index. N documents, T terms, P postings."""

    asins: NDArray[np.bytes_]
    """[N] UTF-8, ascending: a document's number is its place."""
    lengths: NDArray[np.int32]
    """[N] terms of the document, repeats counted."""
    term_text: NDArray[np.uint8]
    """All terms in UTF-8, ascending, one after the other."""
    term_ends: NDArray[np.int64]
    """[T] where a term ends in `term_text`."""
    starts: NDArray[np.int64]
    """[T] first posting of a term."""
    counts: NDArray[np.int64]
    """[T] postings of a term: the documents that have it."""
    documents: NDArray[np.int32]
    """[P] number of the document."""
    saturations: NDArray[np.float32]
    """[P] what the term's weight is divided by: see `similarity`."""


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
"""Type of each array; the width of an asin is that of the longest."""
assert list(TYPES) == [field.name for field in fields(Postings)]


class _TermNumbers(dict[str, int]):
    """Word of a text → number of its term in order of first appearance, or `_STOP`."""

    def __init__(self) -> None:
        self.terms: dict[str, int] = {}

    def __missing__(self, word: str) -> int:
        found = term(word)
        number = self.terms.setdefault(found, len(self.terms)) if found else _STOP
        self[word] = number
        return number


class PostingsBuilder:
    """Takes documents one by one. `keep` may put a run elsewhere and return it from there, memory-mapped."""

    def __init__(self, keep: Callable[[Packed], Packed] = lambda run: run) -> None:
        self._keep = keep
        self._numbers = _TermNumbers()
        self._asins: list[bytes] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._runs: list[Packed] = []
        self._run = array("i")
        self._run_words = array("q")

    def add(self, asin: str, text: str) -> None:
        """Index a document.

        Raises:
            SearchIndexError: the asin is empty or too long, or there are too many documents or terms.
        """
        key = asin.encode()
        if not 0 < len(key) <= LONGEST_ASIN or b"\0" in key:
            raise SearchIndexError(f"{asin[:80]!r} is no asin: give 1 to {LONGEST_ASIN} bytes")
        found = list(map(self._numbers.__getitem__, words(text)))
        self._asins.append(key)
        self._run.extend(found)
        self._run_words.append(len(found))
        if len(self._asins) > _MOST or len(self._numbers.terms) > _MOST:
            raise SearchIndexError(f"an index holds at most {_MOST:,} documents and as many terms: give it fewer")
        if len(self._run) >= _RUN_WORDS:
            self._end_run()

    def _end_run(self) -> None:
        """Sort what was collected since the last run, and put it away."""
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
        """Fill the arrays of `Postings`; nothing can be added any more.

        Raises:
            SearchIndexError: there are no documents, no words in them, or two have the same asin.
        """
        self._end_run()
        if not self._numbers.terms:
            raise SearchIndexError("there is nothing to index: no document has a word that counts")
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
        """The asins, ascending, and where in the order of arrival each of them is."""
        asins = np.array(self._asins)
        order = np.argsort(asins, kind="stable")
        asins = asins[order]
        repeated = np.flatnonzero(asins[1:] == asins[:-1])
        if len(repeated):
            raise SearchIndexError(f"two documents have the asin '{asins[repeated[0]].decode()}': give each once")
        return asins, order

    def _counts(self) -> NDArray[np.int64]:
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
        total = int(counts.sum())
        documents = allocate("documents", np.dtype(TYPES["documents"]), total)
        saturations = allocate("saturations", np.dtype(TYPES["saturations"]), total)
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
        """The packed postings of terms first to last - 1, documents renumbered by `ranks`, in order."""
        ends = np.array([first, last], dtype=np.uint64) << _TERM
        merged = np.concatenate([run[slice(*run.searchsorted(ends))] for run in self._runs])
        renumbered = ranks[_documents(merged)].view(np.uint64) << _DOCUMENT
        return np.sort(merged >> _TERM << _TERM | renumbered | merged & _MOST_OFTEN)


def collect() -> tuple[Allocate, Callable[[], Postings]]:
    """An allocator of plain arrays, and what gives them once they are filled."""
    arrays: dict[str, NDArray[Any]] = {}

    def allocate(name: str, kind: np.dtype[Any], size: int) -> NDArray[Any]:
        arrays[name] = np.empty(size, kind)
        return arrays[name]

    return allocate, lambda: Postings(**arrays)


def _documents(packed: Packed) -> NDArray[np.int64]:
    return (packed >> _DOCUMENT & (_MOST - 1)).astype(np.int64)


def _put(allocate: Allocate, name: str, values: NDArray[Any]) -> None:
    kind = values.dtype if TYPES[name] == "S" else np.dtype(TYPES[name])
    allocate(name, kind, len(values))[:] = values


def _ranks(order: NDArray[np.int64]) -> NDArray[np.int64]:
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return ranks


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of terms with about `_MERGED_POSTINGS` postings each."""
    first = 0
    while first < len(starts):
        last = int((starts + counts).searchsorted(starts[first] + _MERGED_POSTINGS, side="right"))
        last = max(last, first + 1)
        yield first, last
        first = last
