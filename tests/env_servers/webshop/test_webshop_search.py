"""The search engine against searches that were recorded from the original's Lucene index.

The searches are read from `REFERENCE_DIR`, the products from `WEBSHOP_DATA`: official files, plain or compressed.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from env_servers.webshop.search.index import SearchIndex, build
from tests import needs

PRODUCTS = "items_shuffle_1000.json"
SHOWN = 10
LEAST_OVERLAP = 0.995
LEAST_FIRST = 0.995
ROUNDED = 5e-5
"""Recorded scores have four digits."""

Search = Mapping[str, Any]


@pytest.fixture(scope="module")
def searches(reference: Path) -> list[Search]:
    files = sorted(reference.glob("webshop_search*.json.xz"))
    if not files:
        pytest.skip(needs.TRANSCRIPTS)
    return [search for file in files for search in json.loads(lzma.decompress(file.read_bytes()))]


@pytest.fixture(scope="module")
def documents(official_folder: Path) -> list[tuple[str, str]]:
    """(asin, index text) of the products, in the order of the file."""
    plain, packed = official_folder / PRODUCTS, official_folder / f"{PRODUCTS}.xz"
    if plain.is_file():
        products = json.loads(plain.read_bytes())
    elif packed.is_file():
        products = json.loads(lzma.decompress(packed.read_bytes()))
    else:
        pytest.skip(needs.WEBSHOP)
    return [(product["asin"], index_text(product)) for product in products]


@pytest.fixture(scope="module", params=["in memory", "in a folder"])
def index(
    request: pytest.FixtureRequest, documents: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SearchIndex]:
    if request.param == "in memory":
        yield SearchIndex.build_in_memory(documents)
    else:
        folder = tmp_path_factory.mktemp("webshop") / "index"
        build(documents, folder)
        yield SearchIndex.open(folder)


def index_text(product: Mapping[str, Any]) -> str:
    """What the original indexes of an official record."""
    options = [
        f"{name.lower()}: " + ", ".join(choice["value"].strip().replace("/", " | ").lower() for choice in choices)
        for name, choices in (product["customization_options"] or {}).items()
        if choices is not None
    ]
    bullets = product["small_description"]
    first = bullets[0] if isinstance(bullets, list) else bullets
    return " ".join([product["name"], product["full_description"], first, ", and ".join(options)]).lower()


def test_webshop_search_overlap_with_the_first_ten(index: SearchIndex, searches: list[Search]) -> None:
    shares = []
    for search in searches:
        expected, found = set(search["top50"][:SHOWN]), set(index.search(search["query"])[:SHOWN])
        shares.append(len(expected & found) / max(len(expected), len(found), 1) if expected or found else 1.0)
    overlap = sum(shares) / len(shares)
    print(f"overlap@{SHOWN}: {overlap:.4f} over {len(shares)} searches")
    assert overlap >= LEAST_OVERLAP


def test_webshop_search_first_result(index: SearchIndex, searches: list[Search]) -> None:
    same = [index.search(search["query"])[:1] == search["top50"][:1] for search in searches]
    print(f"top-1: {sum(same) / len(same):.4f} over {len(same)} searches")
    assert sum(same) / len(same) >= LEAST_FIRST


def test_webshop_search_all_fifty_in_order(index: SearchIndex, searches: list[Search]) -> None:
    other = [search["query"] for search in searches if index.search(search["query"]) != search["top50"]]
    print(f"the same 50 in the same order: {len(searches) - len(other)} of {len(searches)} searches")
    assert len(other) <= len(searches) * (1 - LEAST_OVERLAP), other[:5]


def test_webshop_search_scores(index: SearchIndex, searches: list[Search]) -> None:
    furthest = 0.0
    for search in searches:
        hits = index.hits(search["query"])
        if [hit.asin for hit in hits] != search["top50"]:
            continue
        for place, (hit, score) in enumerate(zip(hits, search["scores"], strict=True)):
            # equal scores were recorded 1e-6 apart, one by one
            furthest = max(furthest, abs(hit.score - score) - 1e-6 * place)
    print(f"largest difference of a score: {furthest:.1e}")
    assert furthest < 2 * ROUNDED
