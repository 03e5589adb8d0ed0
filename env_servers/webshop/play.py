"""One episode in the shop: the current page, the query, the chosen options, and the effect of every action.

The rules are those of the original's simulated browser and server, oddities included. The page is computed from the
state, so a session is only a few references and short strings.

Invariants
- An invalid action changes nothing.
- The target of a click depends on the page's name. The original derives that name from the URL, which also contains
  the query and the chosen options: see `_named_page`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from env_servers.webshop import pages
from env_servers.webshop.goals import Goal
from env_servers.webshop.products import Product
from env_servers.webshop.reward import Reward
from env_servers.webshop.shop import RANDOM, Hits, Shop

PAGE_SIZE = 10
CACHED_PRODUCTS = 1024

PageName = Literal["search", "search_results", "item_page", "item_sub_page", "done"]

_FIRST_NAMES: tuple[PageName, ...] = ("search_results", "item_page")
_ACTION = re.compile(r"(.+)\[(.+)\]")
_SUB_PAGES = {name.lower(): name for name in pages.SUB_PAGES}
_SEARCH, _BACK, _NEXT, _PREVIOUS, _BUY = (
    name.lower() for name in (pages.SEARCH, pages.BACK_TO_SEARCH, pages.NEXT_PAGE, pages.PREVIOUS_PAGE, pages.BUY_NOW)
)


@functools.lru_cache(CACHED_PRODUCTS)
def clickable_options(product: Product) -> Mapping[str, str]:
    """Return value → option name for the values of a product that a click can choose.

    A value that two options share sets the last of them. A value with the name of a button is that button.
    """
    names = {value: name for name, values in product.options.items() for value in values}
    taken = {_BACK, _PREVIOUS, _BUY, *_SUB_PAGES}
    return {value: name for value, name in names.items() if value not in taken and can_be_clicked(value)}


def can_be_clicked(name: str) -> bool:
    """Whether `click[name]` parses as a click on the name; not if the name contains `[` or a line break."""
    match = _ACTION.match(f"click[{name}]")
    return name != _SEARCH and match is not None and match.groups() == ("click", name)


@functools.lru_cache(CACHED_PRODUCTS)
def _item_clickables(product: Product, sub_pages: tuple[str, ...]) -> tuple[str, ...]:
    values = (value for choices in product.options.values() for value in choices)
    return tuple(dict.fromkeys((_BACK, _PREVIOUS, *map(str.lower, sub_pages), _BUY, *values)))


@dataclass(frozen=True, slots=True)
class Purchase:
    """A purchase: product, chosen options (name → value), price in dollars, and reward."""

    product: Product
    options: dict[str, str]
    price: float
    reward: Reward


class Play:
    """One episode.

    Args:
        shop: shared by all episodes.
        goal: what to buy.
        attributes_button: whether item pages have an Attributes button.

    Attributes:
        page_name: the current page.
        query: the last query, or None on the search page.
        page: number of the results page, from 1; 0 on the search page.
        product: the product whose page was opened last, or None.
        sub_page: which page about the product is open; empty on other pages.
        options: chosen options, name → value, in the order of the first choice.
        visited: asins of the products opened since the search page.
        purchase: what was bought, or None.

    Example:
        # goal: women's sandals for hand wash, rubber sole with color: teal, and size: 10 wide, below 50 dollars
        action                            page_name       options                             score
        search[women's sandals … ]        search_results  {}                                  0
        click[b0nz7f6wf4]                 item_page       {}                                  0
        click[teal]                       item_page       {"color": "teal"}                   0
        click[10 wide]                    item_page       {"color": "teal", "size": "10 wide"} 0
        click[buy now]                    done            {"color": "teal", "size": "10 wide"} 1
    """

    __slots__ = (
        "_attributes_button",
        "_hits",
        "_random_searches",
        "goal",
        "options",
        "page",
        "page_name",
        "product",
        "purchase",
        "query",
        "shop",
        "sub_page",
        "visited",
    )

    page_name: PageName
    query: str | None
    page: int
    product: Product | None
    sub_page: str
    options: dict[str, str]
    visited: frozenset[str]
    purchase: Purchase | None

    def __init__(self, shop: Shop, goal: Goal, *, attributes_button: bool = False) -> None:
        self.shop = shop
        self.goal = goal
        self.purchase = None
        self._attributes_button = attributes_button
        self._random_searches = 0
        self._open_search_page()

    def step(self, action: str) -> float:
        """Take an action and return its score; only a purchase has a score other than 0."""
        match = _ACTION.match(action)
        if match is None:
            return 0.0
        verb, argument = match[1], match[2].lower()
        if verb == "search":
            self._search(argument)
        elif verb == "click" and argument != _SEARCH and argument in self.clickables:
            return self._click(argument)
        return 0.0

    @property
    def has_search_bar(self) -> bool:
        return self.page_name == "search"

    @property
    def clickables(self) -> tuple[str, ...]:
        """Clickable names of the current page, in the original's order."""
        match self.page_name:
            case "search":
                return (_SEARCH,)
            case "search_results":
                back = (_PREVIOUS,) if self.page > 1 else ()
                return (_BACK, *back, _NEXT, *(product.asin.lower() for product in self.listed))
            case "item_page":
                return _item_clickables(self._opened, self._sub_pages)
            case "item_sub_page":
                return (_BACK, _PREVIOUS)
            case _:
                return ()

    @property
    def listed(self) -> Hits:
        """The products on the current results page."""
        return self._hits[(self.page - 1) * PAGE_SIZE : self.page * PAGE_SIZE]

    @property
    def hits(self) -> Hits:
        """All products found by the last search."""
        return self._hits

    def observe(self, mode: pages.Mode) -> str:
        """Return the current page as text."""
        nodes = self._nodes()
        return pages.render_text(nodes) if mode == "text" else pages.render_rich(nodes, self._clicked)

    def digest(self, mode: pages.Mode) -> str:
        """Return a digest of everything that later observations depend on: equal states have equal digests."""
        state = (
            self.page_name,
            self.query,
            self.page,
            self.product and self.product.asin,
            self.sub_page,
            sorted(self.options.items()),
            self._random_searches,
            sorted(self.visited) if mode == "text_rich" else (),
        )
        return hashlib.blake2b(repr(state).encode(), digest_size=12).hexdigest()

    @property
    def _opened(self) -> Product:
        assert self.product is not None, "no product is open"
        return self.product

    @property
    def _sub_pages(self) -> tuple[str, ...]:
        return pages.SUB_PAGES if self._attributes_button else pages.SUB_PAGES[:-1]

    def _nodes(self) -> list[pages.Node]:
        instruction = self.goal.instruction
        match self.page_name:
            case "search":
                return pages.search_page(instruction)
            case "search_results":
                return pages.results_page(instruction, self.listed, self.page, len(self._hits))
            case "item_page":
                return pages.item_page(instruction, self._opened, self._sub_pages)
            case "item_sub_page":
                return pages.item_sub_page(instruction, self._opened, self.sub_page)
            case _:
                assert self.purchase is not None
                bought = self.purchase
                return pages.done_page(bought.product.asin, bought.options, bought.reward.score)

    def _clicked(self, kind: pages.Kind, text: str) -> bool:
        """Whether `text_rich` marks a product or an option as clicked; the original looks for the option in the URL."""
        return text in self.visited if kind == "product" else f'"{text}"' in self._url

    @property
    def _url(self) -> str:
        """The end of the page's URL, after the asin, such as `red+lamp/2/{"color": "teal"}`."""
        words = (self.query or "").replace(" ", "+")
        if self.page_name == "item_page":
            return f"{words}/{self.page}/{json.dumps(self.options)}"
        return f"{words}/{self.page}/{self.sub_page}/{self.options}"

    @property
    def _named_page(self) -> PageName:
        """The page's name as the original determines it: the first of `_FIRST_NAMES` that occurs anywhere in the URL.

        Example:
            On the description page of an item from results page 2, `click[< prev]` normally leads back to the item.
            After `search[search_results lamp]` the URL ends in `search_results+lamp/2/Description/{}`, so the page is
            taken for a results page, and the same click leads to results page 1.
        """
        if self.page_name in ("item_page", "item_sub_page"):
            url = self._url
            for name in _FIRST_NAMES:
                if name in url:
                    return name
        return self.page_name

    def _click(self, name: str) -> float:
        here = self._named_page
        if name == _BUY:
            return self._buy()
        if name == _BACK:
            self._open_search_page()
        elif name == _NEXT and here == "search_results":
            self._open_results(self.page + 1)
        elif name == _PREVIOUS and here == "search_results":
            self._open_results(self.page - 1)
        elif name == _PREVIOUS and here == "item_page":
            self._open_results(self.page)
        elif name in _SUB_PAGES:
            self.page_name, self.sub_page = "item_sub_page", _SUB_PAGES[name]
        else:
            self._open_item(name)
        return 0.0

    def _open_search_page(self) -> None:
        self.page_name = "search"
        self.query = None
        self.page = 0
        self.product = None
        self.sub_page = ""
        self.options = {}
        self.visited = frozenset()
        self._hits: Hits = ()

    def _search(self, query: str) -> None:
        self.query = query
        self._open_results(1)

    def _open_results(self, page: int) -> None:
        """Open a results page. The original repeats the search for each page, which resets product and options."""
        assert self.query is not None
        if self.query.split(" ")[0] == RANDOM:
            self._random_searches += 1
        self._hits = self.shop.find(self.query, self._random_searches)
        self.page_name, self.page = "search_results", page
        self.product, self.sub_page, self.options = None, "", {}

    def _open_item(self, name: str) -> None:
        """Open a product's page: from the results, from a sub-page, or again with an option chosen."""
        if self.page_name == "search_results":
            self.product = next(product for product in self.listed if product.asin.lower() == name)
            self.visited |= {self.product.asin}
        elif self.page_name == "item_page":
            # If several options have this value, a click sets the last one.
            named = [option for option, values in self._opened.options.items() if name in values]
            self.options[named[-1]] = name
        self.page_name, self.sub_page = "item_page", ""

    def _buy(self) -> float:
        price = self.shop.prices[self._opened.asin]
        reward = self.shop.reward(self._opened, self.goal, self.options)
        self.purchase = Purchase(self._opened, dict(self.options), price, reward)
        self.page_name, self.sub_page = "done", ""
        return reward.score
