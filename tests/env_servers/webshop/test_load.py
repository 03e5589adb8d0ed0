"""Opening a shop: the search index is made in memory or kept in a folder, and the choices are logged."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from env_servers.environment import BrokenTask
from env_servers.webshop.goals import synthetic_goals
from env_servers.webshop.load import document_text, open_index, open_shop
from env_servers.webshop.nouns import Tagger
from env_servers.webshop.settings import WebShopSettings
from env_servers.webshop.shop import Shop
from tests.env_servers.webshop.small_shop import CHAIR


def test_document_text_is_title_description_first_bullet_and_options(small_shop: Shop) -> None:
    assert document_text(small_shop.by_asin[CHAIR]) == (
        "solid oak dining chair & cushion stands on a table. easy to clean  "
        'color: antique graywash, red | black, café "noir", and '
        "size: set of 2, one, buy now, round [small], and style: one, plain"
    )


def test_index_is_kept_in_a_folder(small_shop: Shop, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    products = small_shop.products
    first = open_index(products, folder)
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = open_index(products, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    in_memory = open_index(products)
    for query in ("oak chair", "wooden lamp", "green"):
        assert first.search(query) == again.search(query) == in_memory.search(query) != []


def test_index_of_other_products_is_refused(small_shop: Shop, tmp_path: Path) -> None:
    open_index(small_shop.products, tmp_path / "index")
    with pytest.raises(BrokenTask, match="search index unavailable") as raised:
        open_index(small_shop.products[1:], tmp_path / "index")
    assert "\n" not in str(raised.value)


def test_products_can_be_limited_and_choices_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="env_servers.webshop"):
        shop = open_shop(WebShopSettings(products=30, tagger="stop-words"))
    assert len(shop.products) == 30
    assert "opened a shop of 30 generated products" in caplog.text
    assert "noun tagger: stop words" in caplog.text


def test_seed_decides_prices_and_limits() -> None:
    first, same, other = (open_shop(WebShopSettings(products=60, tagger="stop-words", seed=seed)) for seed in (1, 1, 2))
    limits = [[(goal.instruction, goal.options) for goal in shop.goals] for shop in (first, same, other)]
    assert (first.prices, limits[0]) == (same.prices, limits[1])
    assert first.prices != other.prices
    assert limits[0] != limits[2]
    assert [options for _, options in limits[0]] == [options for _, options in limits[2]]


DIGEST = """
from env_servers.webshop.load import open_shop
from env_servers.webshop.settings import WebShopSettings
print(open_shop(WebShopSettings(products=60, tagger="stop-words")).digest)
"""


def test_the_digest_is_that_of_what_makes_goals_and_rewards() -> None:
    def digest(**changed: Any) -> str:
        return open_shop(WebShopSettings(**{"products": 60, "tagger": "stop-words", **changed})).digest

    elsewhere = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert digest() == digest() == elsewhere.stdout.strip()
    assert len({digest(), digest(seed=1), digest(products=61)}) == 3


def test_the_digest_sees_titles_prices_limits_and_tagger(small_shop: Shop) -> None:
    def changed(**parts: Any) -> str:
        names = ("products", "prices", "goals", "tagger")
        made = {name: parts.get(name, getattr(small_shop, name)) for name in names}
        return Shop(search=open_index(small_shop.products), **made).digest

    first, *others = small_shop.products
    found = [
        small_shop.digest,
        changed(products=[dataclasses.replace(first, title="Another"), *others]),
        changed(prices={**small_shop.prices, CHAIR: 1.0}),
        changed(goals=synthetic_goals(small_shop.products, {**small_shop.prices, CHAIR: 500.0}, random.Random(0))),
        changed(tagger=Tagger("another", small_shop.tagger.nouns)),
    ]
    assert changed() == small_shop.digest
    assert len(set(found)) == 5


def test_products_without_goals(tmp_path: Path) -> None:
    (tmp_path / "items_shuffle.json").write_text("[]")
    (tmp_path / "items_ins_v2.json").write_text("{}")
    with pytest.raises(BrokenTask, match="no goals: none of the 0 products has synthetic instructions"):
        open_shop(WebShopSettings(data=tmp_path, tagger="stop-words"))
