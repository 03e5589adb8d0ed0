"""Opens the shop selected by the settings: products, then prices, goals, search index and tagger."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from env_servers.environment import BrokenTask
from env_servers.webshop.generator import generate_products
from env_servers.webshop.goals import draw_prices, human_goals, synthetic_goals
from env_servers.webshop.nouns import open_tagger
from env_servers.webshop.official import load_official
from env_servers.webshop.products import Product
from env_servers.webshop.search.index import SearchIndex, build
from env_servers.webshop.search.postings import SearchIndexError
from env_servers.webshop.settings import DATA_VARIABLE, WebShopSettings
from env_servers.webshop.shop import Shop

logger = logging.getLogger(__name__)


def open_shop(settings: WebShopSettings) -> Shop:
    """Read or generate the products and open the shop.

    Raises:
        BrokenTask: the data is invalid or gives no goals, or the requested tagger is missing.
    """
    began = time.monotonic()
    products = _products(settings)
    rng = random.Random(settings.seed)
    prices = draw_prices(products, rng)
    goals = (human_goals if settings.goals == "human" else synthetic_goals)(products, prices, rng)
    if not goals:
        raise BrokenTask(f"no goals: none of the {len(products)} products has {settings.goals} instructions")
    search = open_index(products, settings.index)
    shop = Shop(products, prices, goals, search, open_tagger(settings.tagger))
    logger.info(
        "opened a shop of %d %s products with %d %s goals in %.1f s",
        len(products),
        source_name(settings),
        len(goals),
        settings.goals,
        time.monotonic() - began,
    )
    return shop


def open_index(products: Sequence[Product], folder: Path | None = None) -> SearchIndex:
    """Return the search index of the products: in memory, or stored in `folder`, where it is built if missing.

    Raises:
        BrokenTask: the products cannot be indexed, or the folder holds another index or other files.
    """
    try:
        if folder is None:
            return SearchIndex.build_in_memory(_documents(products))
        source = _digest(products)
        if not folder.exists():
            logger.info("building a search index of %d products in %s", len(products), folder)
            build(_documents(products), folder, source)
        return SearchIndex.open(folder, source)
    except SearchIndexError as error:
        raise BrokenTask(f"search index unavailable: {error}") from None


def _documents(products: Sequence[Product]) -> Iterator[tuple[str, str]]:
    return ((product.asin, document_text(product)) for product in products)


def _digest(products: Sequence[Product]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for asin, text in _documents(products):
        digest.update(f"{asin} {len(text)} {text}".encode())
    return digest.hexdigest()


def source_name(settings: WebShopSettings) -> str:
    """Return the source of the products, as logged and shown by `about`."""
    return "generated" if settings.data is None else "official"


def document_text(product: Product) -> str:
    """Return the text that is indexed for a product."""
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product.options.items())
    return " ".join((product.title, product.description, product.bullets[0], options)).lower()


def _products(settings: WebShopSettings) -> Sequence[Product]:
    if settings.data is not None:
        return load_official(settings.data, settings.products, human=settings.goals == "human")
    if settings.goals == "human":
        raise BrokenTask(f"human goals need the official files: set {DATA_VARIABLE} to their folder")
    return generate_products(settings.products)
