"""The shop that all sessions of a process share: products, prices, goals, search.

Invariants
- A shop is immutable, except for bounded caches. A session holds references to it and little else.
- The same settings and data give the same shop in every process.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Protocol

from env_servers.webshop.goals import Goal, Goals
from env_servers.webshop.nouns import Tagger
from env_servers.webshop.products import Product
from env_servers.webshop.reward import Reward, compute_reward

RESULTS = 50
RANDOM = "<r>"
CACHED_SEARCHES = 2048

Hits = tuple[Product, ...]


class Search(Protocol):
    """A search engine over the products."""

    def search(self, query: str, k: int = RESULTS) -> list[str]:
        """Return at most `k` asins, best first."""


class Shop:
    """Products, prices, goals and search of one catalogue.

    Attributes:
        products: all products, in the order of the files.
        by_asin: asin → product.
        prices: asin → price in dollars. Pages show the product's price range; the reward uses this price.
        goals: all goals, in their fixed order.
        tagger: finds the nouns of titles.
    """

    def __init__(
        self,
        products: Sequence[Product],
        prices: Mapping[str, float],
        goals: Goals,
        search: Search,
        tagger: Tagger,
    ) -> None:
        self.products = products
        self.by_asin = {product.asin: product for product in products}
        self.prices = prices
        self.goals = goals
        self.tagger = tagger
        self._search = search
        self._found = functools.lru_cache(CACHED_SEARCHES)(self._find)

    @functools.cached_property
    def digest(self) -> str:
        """Digest of everything that determines goals, pages and rewards."""
        digest = hashlib.blake2b(self.tagger.name.encode(), digest_size=16)
        for product in self.products:
            digest.update(f"{product!r} {self.prices[product.asin]!r}".encode(errors="surrogatepass"))
        for asin, limit in self.goals.limits():
            digest.update(f"{asin} {limit!r}".encode())
        return digest.hexdigest()

    def find(self, query: str, number: int = 0) -> Hits:
        """Return the products that a search finds, in order.

        `<a> attribute`, `<c> category` and `<q> query` find all products with that property. `<r>` returns `RESULTS`
        random products, different for every `number`. Any other query returns the best `RESULTS` matches.
        """
        return self._choose(number) if query.split(" ")[0] == RANDOM else self._found(query)

    def reward(self, product: Product, goal: Goal, options: Mapping[str, str]) -> Reward:
        """Return the reward for buying the product with these options (name → value)."""
        return compute_reward(product, goal, self.prices[product.asin], options, self.tagger.nouns)

    def _choose(self, number: int) -> Hits:
        rng = random.Random(f"webshop random search {number}")
        return tuple(rng.sample(self.products, min(RESULTS, len(self.products))))

    def _find(self, query: str) -> Hits:
        kind, _, words = query.partition(" ")
        match kind:
            case "<a>":
                return tuple(product for product in self.products if words.strip() in product.attributes)
            case "<c>":
                category = words.split(" ")[0].strip()
                return tuple(product for product in self.products if product.category == category)
            case "<q>":
                return tuple(product for product in self.products if product.query == words.strip())
            case _:
                asins = self._search.search(query, k=RESULTS)
                return tuple(self.by_asin[asin] for asin in asins if asin in self.by_asin)
