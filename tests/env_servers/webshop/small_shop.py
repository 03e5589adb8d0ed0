"""A small shop in which every rule can be tried."""

from __future__ import annotations

import random
from typing import Any

from env_servers.webshop.goals import draw_prices, synthetic_goals
from env_servers.webshop.load import document_text
from env_servers.webshop.nouns import open_tagger
from env_servers.webshop.products import make_products
from env_servers.webshop.search.index import SearchIndex
from env_servers.webshop.shop import Shop

Record = dict[str, Any]

CHAIR = "B000000001"
SOFA = "B000000002"


def build_record(asin: str, name: str = "Wooden Lamp", **fields: Any) -> Record:
    return {
        "asin": asin,
        "name": name,
        "full_description": "Stands on a table.",
        "small_description": ["Easy to clean ", "Warm light "],
        "category": "garden",
        "product_category": "Home & Kitchen › Lighting › Table Lamps",
        "query": "Table Lamps ",
        "pricing": "$20.0",
        "customization_options": "",
        "images": ["https://example.org/lamp.jpg"],
        **fields,
    }


def build_shop() -> Shop:
    """A dining chair in colours and sizes, a sofa, and 12 lamps."""
    chair = build_record(
        CHAIR,
        "Solid Oak Dining Chair & Cushion",
        product_category="Home & Kitchen › Furniture › Dining Chairs",
        query="dining chairs",
        pricing="$55.0$75.5",
        customization_options={
            "Color": [{"value": "Antique Graywash"}, {"value": "Red/Black"}, {"value": 'Café "Noir"'}],
            "Size": [{"value": "Set of 2"}, {"value": "One"}, {"value": "Buy Now"}, {"value": "round [small]"}],
            "Style": [{"value": "one"}, {"value": "plain"}],
        },
    )
    sofa = build_record(
        SOFA,
        "Green Sofa",
        full_description="",
        small_description="",
        product_category="Home & Kitchen › Furniture › Sofas",
        query="sofas",
        pricing="",
    )
    lamps = [build_record(f"B0000001{number:02}", f"Wooden Lamp No. {number}") for number in range(12)]
    notes = {
        CHAIR: {
            "attributes": ["solid wood", "easy clean"],
            "instruction": "Find me dining chairs with solid wood",
            "instruction_attributes": ["solid wood"],
        },
        SOFA: {"attributes": ["living room"]},
    }
    products = list(make_products([chair, sofa, *lamps], notes, {}))
    rng = random.Random(0)
    prices = draw_prices(products, rng)
    goals = synthetic_goals(products, prices, rng)
    search = SearchIndex.build_in_memory((product.asin, document_text(product)) for product in products)
    return Shop(products, prices, goals, search, open_tagger("stop-words"))
