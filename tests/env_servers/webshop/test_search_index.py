"""Search against a plain implementation of BM25: order, ties, and an index built from many runs."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from env_servers.webshop.search import postings
from env_servers.webshop.search.analysis import analyze
from env_servers.webshop.search.index import SearchIndex, build
from env_servers.webshop.search.postings import SearchIndexError

DOCUMENTS = {
    "B3": "red shoes red laces",
    "B1": "blue shoes",
    "B2": "blue shoes",
    "B5": "the and of",
    "B4": "green socks, " + "very " * 40 + "long socks",
}

letters = st.text("abcd", min_size=1, max_size=2)
texts = st.lists(letters, max_size=60).map(" ".join)
catalogues = st.dictionaries(st.text("BCD12é", min_size=1, max_size=4), texts, min_size=1, max_size=40)


@pytest.fixture(scope="module")
def index() -> SearchIndex:
    return SearchIndex.build_in_memory(DOCUMENTS.items())


def bm25(catalogue: dict[str, str], query: str) -> dict[str, float]:
    """asin -> score of the documents that have a term of the query."""
    terms = {asin: Counter(analyze(text)) for asin, text in catalogue.items()}
    some = [found.total() for found in terms.values() if found]
    scores: dict[str, float] = {}
    for term, repeats in Counter(analyze(query)).items():
        count = sum(term in found for found in terms.values())
        weight = repeats * math.log(1 + (len(some) - count + 0.5) / (count + 0.5))
        for asin, found in terms.items():
            if term in found:
                surplus = found.total() - 24
                shift = max(surplus.bit_length() - 4, 0)
                length = found.total() if surplus < 0 else 24 + (surplus >> shift << shift)
                norm = 0.9 * (0.6 + 0.4 * length / (sum(some) / len(some)))
                scores[asin] = scores.get(asin, 0) + weight * found[term] / (found[term] + norm)
    return scores


@given(catalogues, texts, st.integers(1, 50))
def test_search_is_bm25(catalogue: dict[str, str], query: str, k: int) -> None:
    assume(any(map(analyze, catalogue.values())))
    hits = SearchIndex.build_in_memory(catalogue.items()).hits(query, k)
    expected = bm25(catalogue, query)
    assert len(hits) == min(k, len(expected))
    assert all(hit.score == pytest.approx(expected.pop(hit.asin), rel=1e-5) for hit in hits)
    assert hits == sorted(hits, key=lambda hit: (-hit.score, hit.asin.encode()))
    assert max(expected.values(), default=0) <= min((hit.score for hit in hits), default=0) * (1 + 1e-5)


@given(catalogue=catalogues, query=texts, data=st.data())
def test_the_order_of_the_documents_does_not_matter(catalogue: dict[str, str], query: str, data: st.DataObject) -> None:
    assume(any(map(analyze, catalogue.values())))
    other = data.draw(st.permutations(list(catalogue.items())))
    first, second = SearchIndex.build_in_memory(catalogue.items()), SearchIndex.build_in_memory(other)
    assert first.hits(query) == second.hits(query)


def test_equal_scores_are_in_order_of_the_asin(index: SearchIndex) -> None:
    assert index.search("blue shoes") == ["B1", "B2", "B3"]
    assert index.search("blue", k=1) == ["B1"]
    assert index.search("red blue") == ["B3", "B1", "B2"]


def test_ties_beyond_a_block_are_in_order_of_the_asin() -> None:
    catalogue = {f"B{number:05}": "shoes" if number % 3 else "shoes socks" for number in range(40_000)}
    found = SearchIndex.build_in_memory(reversed(catalogue.items())).search("shoes socks")
    assert found == [f"B{number:05}" for number in range(0, 150, 3)]


@pytest.mark.parametrize("query", ["", "   ", "the of and to", "unheard of", "!?"])
def test_what_finds_nothing(index: SearchIndex, query: str) -> None:
    assert index.search(query) == []


def test_repeated_words_count_again(index: SearchIndex) -> None:
    once, twice = index.hits("socks"), index.hits("socks socks")
    assert [hit.asin for hit in twice] == ["B4"]
    assert twice[0].score == pytest.approx(2 * once[0].score)


def test_the_number_of_documents_counts_those_without_words(index: SearchIndex) -> None:
    assert len(index) == len(DOCUMENTS)


def test_at_least_one_document_is_asked_for(index: SearchIndex) -> None:
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        index.search("shoes", k=0)


def test_many_runs_and_merges_give_the_same_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vocabulary = [f"w{number}" for number in range(200)]
    catalogue = {
        f"B{number:04}": " ".join(rng.choice(vocabulary[: 1 + number % 200], size=number % 30))
        for number in rng.permutation(1000)
    }
    whole = SearchIndex.build_in_memory(catalogue.items())
    monkeypatch.setattr(postings, "_RUN_WORDS", 97)
    monkeypatch.setattr(postings, "_MERGED_POSTINGS", 61)
    build(catalogue.items(), tmp_path / "index")
    parts = SearchIndex.open(tmp_path / "index")
    for _ in range(100):
        query = " ".join(rng.choice(vocabulary, size=5))
        assert parts.hits(query) == whole.hits(query)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "nothing to index"),
        ([("B1", "the"), ("B2", "")], "nothing to index"),
        ([("B1", "red"), ("B2", "blue"), ("B1", "green")], "duplicate asin 'B1'"),
        ([("", "red")], "invalid asin ''"),
        ([("B" * 65, "red")], "invalid asin"),
        ([("B\0", "red")], "invalid asin"),
    ],
)
def test_what_cannot_be_indexed(tmp_path: Path, documents: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(SearchIndexError, match=message):
        SearchIndex.build_in_memory(documents)
    with pytest.raises(SearchIndexError, match=message):
        build(documents, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []
