"""The reward of a purchase: how well the product, its options and its price fit the goal.

`(attributes met + options met + price met) / (attributes + options + 1) · r_type`, every part as the original computes
it, oddities included: a goal's options are compared as Python writes the pair, `('color', 'red')`, a colour stands for
the values that contain it, and a word repeated in the goal's title counts against the title's score.
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
"""`token_set_ratio` above which two texts are the same thing."""
CACHED_PAIRS = 1 << 15

Nouns = Callable[[str], list[str]]


@dataclass(frozen=True, slots=True)
class Reward:
    """The score of a purchase in [0, 1] with its parts; `r_` are the parts, `w_` their weights.

    `r_option` and `w_option` are None for a goal without options.
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
        """Everything but the score, without the parts that the goal has not."""
        names = (name for name in self.__slots__ if name != "score")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def compute_reward(product: Product, goal: Goal, price: float, options: Mapping[str, str], nouns: Nouns) -> Reward:
    """The reward for buying `product` at `price` with `options` (name -> value); `nouns` tags titles."""
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
    """Whether a chosen value is as good as an option of a goal."""
    return bool(fuzz.token_set_ratio(normalise_colour(value), normalise_colour(wanted)) > FUZZY_MATCH)


def _type_reward(alike: bool, title_score: float) -> float:
    """Whether it is the same kind of thing. `alike`: by query or by category."""
    if title_score == 0.0:
        return 0.0
    if title_score < 0.1:
        return 0.1
    return 1.0 if alike or title_score > 0.2 else 0.5


def _title_score(bought: list[str], wanted: list[str]) -> float:
    return len(set(bought) & set(wanted)) / len(wanted) if wanted else 0.2


def _categories(product: Product) -> set[str]:
    return {part.strip() for part in product.product_category.split("›")}


def _has_attribute(product: Product, attribute: str) -> bool:
    if any(fuzz.token_set_ratio(own, attribute) > FUZZY_MATCH for own in product.attributes):
        return True
    texts = (product.title, " ".join(product.bullets), product.description)
    return any(attribute in text.lower() for text in texts)
