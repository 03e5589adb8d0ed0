"""A scripted expert for the shop: it knows the product that the goal was made from, and buys it.

It searches with the instruction's words if they find the product, otherwise with other words of the goal or the title.
It chooses the options with the best score, which are not always those that the goal names: see `reward`. Its action
depends only on the current page, so it can take over after any other actions.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from env_servers.webshop.goals import Goal
from env_servers.webshop.play import PAGE_SIZE, Play, clickable_options
from env_servers.webshop.products import Product
from env_servers.webshop.reward import meets_option
from env_servers.webshop.shop import RESULTS, Shop

MAX_QUERY_CHARS = 500

_PRICE_LIMIT = re.compile(r", and price lower than [\d.]+ dollars$")
_NOT_IN_A_QUERY = re.compile(r"[\[\]\n]")

Wanted = tuple[str, str] | str
Choices = Mapping[str, str]
"""Option name -> value."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """A value of an option, with the numbers of the wanted options that it meets and whether the goal names it."""

    name: str
    value: str
    met: frozenset[int]
    named: bool


class Expert:
    """Chooses actions for one play."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self._product = play.goal.product
        self._query = choose_query(play.shop, play.goal)
        self._choices = choose_options(self._product, play.goal.options)

    def next_action(self) -> str | None:
        """Return the next action, or None after the purchase."""
        play = self._play
        if play.page_name == "done":
            return None
        if play.page_name == "search":
            return f"search[{self._query}]"
        if play.page_name == "search_results":
            return self._on_results()
        if play.product is self._product:
            return self._on_product() if play.page_name == "item_page" else "click[< prev]"
        return "click[< prev]" if play.query == self._query else "click[back to search]"

    def _on_results(self) -> str:
        play = self._play
        if self._product in play.listed:
            return f"click[{self._product.asin.lower()}]"
        if play.query != self._query or self._product not in play.hits:
            return "click[back to search]"
        page = play.hits.index(self._product) // PAGE_SIZE + 1
        return "click[next >]" if play.page < page else "click[< prev]"

    def _on_product(self) -> str:
        chosen = self._play.options
        missing = (value for name, value in self._choices.items() if chosen.get(name) != value)
        return f"click[{next(missing, 'buy now')}]"


def choose_query(shop: Shop, goal: Goal) -> str:
    """Return the query that finds the goal's product on the earliest page; on a tie, the instruction's own words."""
    pages: dict[str, int] = {}
    for words in _queries(goal):
        query = " ".join(_NOT_IN_A_QUERY.sub(" ", words[:MAX_QUERY_CHARS]).lower().split())
        hits = shop.find(query)
        pages[query] = hits.index(goal.product) // PAGE_SIZE if goal.product in hits else RESULTS
        if pages[query] == 0:
            break
    return min(pages, key=pages.__getitem__)


def choose_options(product: Product, wanted: Sequence[Wanted]) -> Choices:
    """Choose values that together meet as many wanted options as possible, preferably values that the goal names.

    Example:
        # the product has the options color (olive, teal, …) and size (6, 10 wide, …)
        choose_options(product, [("color", "teal"), ("size", "10 wide")])  # {"color": "teal", "size": "10 wide"}
    """
    named = frozenset(want if isinstance(want, tuple) else ("", want) for want in wanted)
    offers: dict[str, dict[frozenset[int], _Offer]] = {}
    for value, name in clickable_options(product).items():
        met = frozenset(number for number, want in enumerate(wanted) if meets_option(value, want))
        offer = _Offer(name, value, met, (name, value) in named or ("", value) in named)
        same = offers.setdefault(name, {frozenset(): _Offer(name, "", frozenset(), False)})
        if met and (met not in same or offer.named):
            same[met] = offer
    best = max(itertools.product(*(same.values() for same in offers.values())), key=_worth)
    return {offer.name: offer.value for offer in best if offer.met}


def _worth(offers: Sequence[_Offer]) -> tuple[int, int, int]:
    """Sort key: wanted options met, then values that the goal names, then few clicks."""
    met = frozenset[int]().union(*(offer.met for offer in offers))
    return len(met), sum(offer.named for offer in offers), -sum(bool(offer.met) for offer in offers)


def _queries(goal: Goal) -> Iterator[str]:
    """Yield candidate queries, the most natural first."""
    values = [wanted[1] if isinstance(wanted, tuple) else wanted for wanted in goal.options]
    yield _PRICE_LIMIT.sub("", goal.instruction)
    yield " ".join((goal.product.query, *goal.attributes, *values))
    yield goal.product.title
    yield f"{goal.product.title} {goal.product.description}"
