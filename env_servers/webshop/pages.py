"""The shop's pages as an agent reads them: the text nodes that BeautifulSoup finds in the original's HTML pages.

A page is a sequence of text nodes. `text` joins them with ` [SEP] `; `text_rich` puts each on its own line and marks
what can be clicked and what has been clicked.

Invariants
- A product's text is unchanged, except that the parser drops a text of white space with a newline in it, and turns any
  other text of white space into one space.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from env_servers.webshop.products import Product

Mode = Literal["text", "text_rich"]
Kind = Literal["plain", "button", "option", "product"]
Node = tuple[Kind, str]

SEPARATOR = " [SEP] "
SEARCH = "Search"
BACK_TO_SEARCH = "Back to Search"
NEXT_PAGE = "Next >"
PREVIOUS_PAGE = "< Prev"
BUY_NOW = "Buy Now"
DESCRIPTION, FEATURES, REVIEWS, ATTRIBUTES = SUB_PAGES = ("Description", "Features", "Reviews", "Attributes")

_SPACES = "\n\t\f\r "


def search_page(instruction: str) -> list[Node]:
    return [("plain", "WebShop"), ("plain", "Instruction: "), *_plain(instruction), ("button", SEARCH)]


def results_page(instruction: str, products: Iterable[Product], page: int, total: int) -> list[Node]:
    """Return page `page` of a search with `total` results; `products` are those on the page."""
    nodes = [*_head(instruction), ("button", BACK_TO_SEARCH), ("plain", f"Page {page} (Total results: {total})")]
    if page > 1:
        nodes.append(("button", PREVIOUS_PAGE))
    nodes.append(("button", NEXT_PAGE))
    for product in products:
        nodes.append(("product", product.asin))
        nodes.extend(_plain(product.title, product.price_tag))
    return nodes


def item_page(instruction: str, product: Product, sub_pages: Sequence[str]) -> list[Node]:
    nodes = _item_head(instruction)
    for name, values in product.options.items():
        nodes.extend(_plain(name))
        nodes.extend(("option", value) for value in values if value)
    nodes.extend(_plain(product.title, f"Price: {product.price_tag}", "Rating: N.A."))
    nodes.extend(("button", name) for name in sub_pages)
    nodes.append(("button", BUY_NOW))
    return nodes


def item_sub_page(instruction: str, product: Product, sub_page: str) -> list[Node]:
    """Return a page about the product. The page of reviews is empty: the original does not load any."""
    nodes = _item_head(instruction)
    if sub_page == DESCRIPTION:
        nodes.extend(_plain(product.description))
    elif sub_page == FEATURES:
        nodes.extend(_plain(*(f" {bullet}" for bullet in product.bullets)))
    elif sub_page == ATTRIBUTES:
        nodes.extend(_plain(*(f" {attribute}" for attribute in product.attributes)))
        nodes.extend(_plain(product.category, product.query, product.product_category))
    return nodes


def done_page(asin: str, options: Mapping[str, str], score: float) -> list[Node]:
    """Return the page after a purchase. The original passes nothing about the goal, so most fields are empty."""
    chosen = json.dumps(options, sort_keys=True)
    for character in "<>&'":
        chosen = chosen.replace(character, f"\\u{ord(character):04x}")
    texts = ["Thank you for shopping with us!", "Your code: ", "None", " (Paste it in your MTurk interface.)"]
    texts += ["Purchased", "asin", asin, "options", chosen, "attrs", "None", "category", "None", "query", "None"]
    texts += ["product category", "None", "Target", "asin", "options", "attrs", "price upper", "instuction text"]
    texts += ["category", "product category", "query", "Goal ", "None", "Reward"]
    texts += ["Your score (min 0.0, max 1.0)", str(score), "Reward Details ", "None"]
    return [("plain", text) for text in texts]


def render_text(nodes: Iterable[Node]) -> str:
    return SEPARATOR.join(text.strip() for _, text in nodes)


def render_rich(nodes: Iterable[Node], clicked: Callable[[Kind, str], bool]) -> str:
    """Return the `text_rich` form; `clicked` tells whether an option or a product was clicked."""
    told, lines = "", []
    for kind, text in nodes:
        if kind == "plain":
            lines.append(text)
        elif kind == "button":
            lines.append(f"[button] {text} [button_]")
        else:
            mark = "clicked button" if clicked(kind, text) else "button"
            lines.append(f"{'  ' if kind == 'option' else chr(10)}[{mark}] {text} [{mark}_]")
            if kind == "option" and mark == "clicked button":
                told = f"You have clicked {text}.\n{told}"
    return told + "".join(f"{line}\n" for line in lines)


def _head(instruction: str) -> list[Node]:
    return [("plain", "Instruction:"), *_plain(instruction)]


def _item_head(instruction: str) -> list[Node]:
    return [*_head(instruction), ("button", BACK_TO_SEARCH), ("button", PREVIOUS_PAGE)]


def _plain(*texts: str) -> Iterator[Node]:
    for text in texts:
        if text.strip(_SPACES):
            yield "plain", text
        elif text and "\n" not in text:
            yield "plain", " "
