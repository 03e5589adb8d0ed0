"""The reward of a purchase: how well the product, its options and its price match the goal.

`(attributes met + options met + price met) / (attributes + options + 1) · r_type`. Every part is computed as in the
original, oddities included: an option of a goal is compared in Python's notation of the pair, `('color', 'red')`; a
colour replaces every value that contains it; a word that is repeated in the goal's title lowers the title score.

Example:
    The goal asks for the attributes "hand wash" and "rubber sole", the options color: teal and size: 10 wide, and a
    price below 50.00 dollars. The right product, for 27.01 dollars, with the option teal only, meets 2 of 2 attributes,
    1 of 2 options and the price, and r_type is 1:

    score = (2 + 1 + 1) / (2 + 2 + 1) · 1 = 0.8
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from thefuzz import fuzz

from env_servers.webshop.colours import normalise_colour
from env_servers.webshop.goals import Goal
from env_servers.webshop.products import Product

FUZZY_MATCH = 85
"""Two texts match if their `token_set_ratio` is above this."""
CACHED_PAIRS = 1 << 15

Nouns = Callable[[str], list[str]]


@dataclass(frozen=True, slots=True)
class Reward:
    """The score of a purchase with its parts, all in [0, 1].

    Attributes:
        score: the reward.
        r_type: factor for the kind of product: 0, 0.1, 0.5 or 1.
        r_att: fraction of the goal's attributes that are met.
        w_att: weight of `r_att` in the score.
        query_match: the product belongs to the same query as the goal's.
        category_match: the two products share at least two category levels.
        title_score: fraction of the nouns of the goal's title that occur in the product's title.
        r_option: fraction of the goal's options that are met; None for a goal without options.
        w_option: weight of `r_option`; None for a goal without options.
        r_price: the price is within the limit.
        w_price: weight of `r_price`.
    """

    score: float
    r_type: float
    r_att: float
    w_att: float
    query_match: bool
    category_match: bool
    title_score: float
    r_option: float | None
    w_option: float | None
    r_price: bool
    w_price: float

    @property
    def parts(self) -> dict[str, float | bool]:
        """All fields except the score; fields that are None are left out."""
        names = (name for name in self.__slots__ if name != "score")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def compute_reward(product: Product, goal: Goal, price: float, options: Mapping[str, str], nouns: Nouns) -> Reward:
    """Return the reward for buying `product` at `price` with `options` (name → value); `nouns` tags titles."""
    query_match = product.query == goal.product.query
    category_match = len(_categories(product) & _categories(goal.product)) >= 2
    title_score = _title_score(nouns(product.title), nouns(goal.product.title))
    r_type = _type_reward(query_match or category_match, title_score)
    attributes = sum(_has_attribute(product, attribute) for attribute in goal.attributes)
    matched = sum(any(meets_option(value, wanted) for value in options.values()) for wanted in goal.options)
    r_price = price <= goal.price_upper
    parts = len(goal.attributes) + len(goal.options) + 1
    return Reward(
        score=(attributes + matched + r_price) / parts * r_type,
        r_type=r_type,
        r_att=attributes / len(goal.attributes),
        w_att=len(goal.attributes) / parts,
        query_match=query_match,
        category_match=category_match,
        title_score=title_score,
        r_option=matched / len(goal.options) if goal.options else None,
        w_option=len(goal.options) / parts if goal.options else None,
        r_price=r_price,
        w_price=1 / parts,
    )


@functools.lru_cache(CACHED_PAIRS)
def meets_option(value: str, wanted: tuple[str, str] | str) -> bool:
    """Whether a chosen value matches an option of a goal.

    Example:
        meets_option("large", ("size", "large"))    # True
        meets_option("x-large", ("size", "large"))  # False
        meets_option("dark red", "red")             # False: "dark" comes before "red" in the list of colours
    """
    return bool(fuzz.token_set_ratio(normalise_colour(value), normalise_colour(wanted)) > FUZZY_MATCH)


def _type_reward(alike: bool, title_score: float) -> float:
    """Return the factor for the kind of product; `alike`: query or category match."""
    if title_score == 0.0:
        return 0.0
    if title_score < 0.1:
        return 0.1
    return 1.0 if alike or title_score > 0.2 else 0.5


def _title_score(bought: list[str], wanted: list[str]) -> float:
    """Return the fraction of the wanted nouns in the bought title; repetitions count in the denominator only.

    Example:
        _title_score(["nike", "shoe"], ["nike", "running", "shoe", "shoe"])  # 2 / 4 = 0.5
    """
    return len(set(bought) & set(wanted)) / len(wanted) if wanted else 0.2


def _categories(product: Product) -> set[str]:
    return {part.strip() for part in product.product_category.split("›")}


def _has_attribute(product: Product, attribute: str) -> bool:
    """Whether one of the product's attributes matches, or any of its texts contains the attribute."""
    if any(fuzz.token_set_ratio(own, attribute) > FUZZY_MATCH for own in product.attributes):
        return True
    texts = (product.title, " ".join(product.bullets), product.description)
    return any(attribute in text.lower() for text in texts)
