"""The generated catalogue: the same everywhere, of the official records' variety, with goals worth playing."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter

from env_servers.webshop.generator import PRODUCTS, generate_products
from env_servers.webshop.reward import meets_option
from env_servers.webshop.shop import Shop
from env_servers.webshop.vocabulary import VOCABULARY, Option

DIGEST = """
import hashlib
from env_servers.webshop.load import open_shop
from env_servers.webshop.settings import WebShopSettings
shop = open_shop(WebShopSettings(tagger="stop-words"))
seen = [(p.asin, p.title, p.description, p.bullets, p.options, shop.prices[p.asin]) for p in shop.products]
seen += [(g.product.asin, g.instruction, g.price_upper, g.options) for g in shop.goals]
print(hashlib.sha256(repr(seen).encode()).hexdigest())
"""


def test_same_catalogue_in_every_process(generated_shop: Shop) -> None:
    shop = generated_shop
    seen: list[object] = [
        (p.asin, p.title, p.description, p.bullets, p.options, shop.prices[p.asin]) for p in shop.products
    ]
    seen += [(g.product.asin, g.instruction, g.price_upper, g.options) for g in shop.goals]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WEBSHOP_")}
    process = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env={**environment, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert process.stdout.strip() == hashlib.sha256(repr(seen).encode()).hexdigest()


def test_a_smaller_catalogue_is_the_beginning_of_a_larger_one(generated_shop: Shop) -> None:
    few = generate_products(40)
    assert [p.asin for p in few] == [p.asin for p in generated_shop.products[:40]]
    assert [p.bullets for p in few] == [p.bullets for p in generated_shop.products[:40]]


def test_variety(generated_shop: Shop) -> None:
    products = generated_shop.products
    assert len(products) == len({p.asin for p in products}) == PRODUCTS
    departments = Counter(p.category for p in products)
    assert set(departments) == {"beauty", "electronics", "fashion", "garden", "grocery"}
    assert min(departments.values()) > 80
    assert len({p.query for p in products}) == len({kind.query for kind in VOCABULARY.kinds})
    assert len({p.title for p in products}) > 0.99 * PRODUCTS
    assert 0.05 < sum(len(p.prices) == 2 for p in products) / PRODUCTS < 0.15
    assert {len(p.options) for p in products} == {0, 1, 2, 3}
    assert min(p.prices[0] for p in products) < 10 < 500 < max(p.prices[0] for p in products)
    assert 350 < sum(p.instruction is not None for p in products) < 550


def test_near_duplicates(generated_shop: Shop) -> None:
    """Many products share maker, line and noun with another one but not the attributes."""
    names = Counter(p.title.split(",")[0] for p in generated_shop.products)
    assert sum(count for count in names.values() if count > 1) > 0.3 * PRODUCTS
    by_name: dict[str, set[tuple[str, ...]]] = {}
    for p in generated_shop.products:
        by_name.setdefault(p.title.split(",")[0], set()).add(tuple(sorted(p.attributes)))
    shared = [kinds for name, kinds in by_name.items() if names[name] > 1]
    assert sum(len(kinds) > 1 for kinds in shared) > 0.95 * len(shared)


def test_goals_can_be_met_and_are_not_obvious(generated_shop: Shop) -> None:
    goals = list(generated_shop.goals)
    assert len(goals) > 4000
    assert len({goal.instruction for goal in goals}) > 0.99 * len(goals)
    assert all(set(goal.attributes) <= set(goal.product.attributes) for goal in goals)
    assert all(generated_shop.prices[goal.product.asin] <= goal.price_upper for goal in goals)
    alike = [
        sum(
            p.query == goal.product.query and set(goal.attributes) <= set(p.attributes) for p in generated_shop.products
        )
        for goal in goals[:300]
    ]
    assert sum(count > 1 for count in alike) > 100
    first = sum(generated_shop.find(goal.instruction)[0] is goal.product for goal in goals[:300])
    assert 30 < first < 270


def test_values_can_be_met_but_for_two() -> None:
    """`wash` is taken for the colour `ash`: as in the official catalogue some goals cannot be met in full."""
    options = {option for kind in VOCABULARY.kinds for option in kind.options}
    hopeless = {value for option in options for value in option.values if not _can_be_met(option, value)}
    assert hopeless == {"Light Wash", "Medium Wash"}


def _can_be_met(option: Option, value: str) -> bool:
    chosen = value.lower().replace("/", " | ")
    return meets_option(chosen, (option.label.lower(), chosen))


def test_vocabulary_is_consistent() -> None:
    for kind in VOCABULARY.kinds:
        labels = [option.label for option in kind.options]
        assert len(set(labels)) == len(labels)
        assert all(len(set(option.values)) == len(option.values) for option in kind.options)
        assert kind.attributes
        assert VOCABULARY.traits[kind.category]
        assert 0 < kind.prices[0] < kind.prices[1]
