"""The goals of a shop, and the prices that they refer to.

Invariants
- Prices and price limits are drawn from one seeded generator, in the order of the products. The goals are shuffled with
  the original's seed 233. The same products and seed give the same goals in every process.
- Goals are created on access. Stored are one template per instruction and one number per goal.
"""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from env_servers.webshop.products import Instruction, Product

SHUFFLE_SEED = 233
NO_LIMIT = 1_000_000.0

_LIMITS = tuple(10.0 * step for step in range(1, 100))


@dataclass(frozen=True, slots=True)
class Goal:
    """What to buy.

    Attributes:
        product: the product that the goal was made from. Other products may satisfy the goal too.
        instruction: the goal in words.
        attributes: required attributes.
        price_upper: highest price in dollars.
        options: required options: (name, value) pairs; for human goals, values only.
        weight: relative probability with which the original draws the goal.
    """

    product: Product
    instruction: str
    attributes: tuple[str, ...]
    price_upper: float
    options: tuple[tuple[str, str], ...] | tuple[str, ...]
    weight: float


@dataclass(frozen=True, slots=True)
class _Template:
    """An instruction with its price limit: one goal for every combination of the product's options.

    Example:
        options color (red, blue) and size (s, m, l): 6 goals; options(4) is (("color", "blue"), ("size", "m"))
    """

    product: Product
    instruction: Instruction
    price_upper: float

    @property
    def goals(self) -> int:
        if self.instruction.options is not None:
            return 1
        return math.prod(len(values) for values in self.product.options.values())

    def options(self, number: int) -> tuple[tuple[str, str], ...]:
        """Return combination `number` of the options: names sorted, the last name varies fastest."""
        chosen: list[tuple[str, str]] = []
        for name in sorted(self.product.options, reverse=True):
            number, place = divmod(number, len(self.product.options[name]))
            chosen.append((name, self.product.options[name][place]))
        return tuple(reversed(chosen))


class Goals(Sequence[Goal]):
    """All goals of a shop, in their fixed order."""

    def __init__(self, templates: Sequence[_Template]) -> None:
        self._templates = [template for template in templates if template.goals]
        self._ends = list(accumulate(template.goals for template in self._templates))
        self._order = array("Q", range(self._ends[-1] if self._ends else 0))
        random.Random(SHUFFLE_SEED).shuffle(self._order)
        self._uses: Counter[str] = Counter()
        for template in self._templates:
            for attribute in template.instruction.attributes:
                self._uses[attribute] += template.goals

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Goal:  # type: ignore[override]
        number = self._order[index]
        place = bisect_right(self._ends, number)
        template = self._templates[place]
        first = self._ends[place - 1] if place else 0
        return _goal(template, number - first, self._weight(template.instruction))

    def __iter__(self) -> Iterator[Goal]:
        return (self[index] for index in range(len(self)))

    def limits(self) -> Iterator[tuple[str, float]]:
        """Return asin and price limit of every template, in the order of the products."""
        return ((template.product.asin, template.price_upper) for template in self._templates)

    def _weight(self, instruction: Instruction) -> float:
        """Mean inverse frequency of the attributes among all goals; 1 for a human goal."""
        if instruction.options is not None:
            return 1.0
        return sum(1.0 / self._uses[a] for a in instruction.attributes) / len(instruction.attributes)


def draw_prices(products: Sequence[Product], rng: random.Random) -> dict[str, float]:
    """Return asin → price; from a range of prices one is drawn uniformly, in the order of the products."""
    return {p.asin: rng.uniform(*p.prices) if len(p.prices) == 2 else p.prices[0] for p in products}


def synthetic_goals(products: Sequence[Product], prices: Mapping[str, float], rng: random.Random) -> Goals:
    """Return one goal for every combination of options of every product with an instruction."""
    return Goals(
        [
            _Template(product, product.instruction, _draw_limit(prices[product.asin], rng))
            for product in products
            if product.instruction is not None and product.instruction.attributes
        ]
    )


def human_goals(products: Sequence[Product], prices: Mapping[str, float], rng: random.Random) -> Goals:
    """Return one goal for every crowd-written instruction that requires an attribute."""
    return Goals(
        [
            _Template(product, instruction, _draw_limit(prices[product.asin], rng))
            for product in products
            for instruction in product.human
            if instruction.attributes
        ]
    )


def _draw_limit(price: float, rng: random.Random) -> float:
    """Return the higher of two draws from the next four multiples of ten dollars; no limit if fewer than two are left.

    Example:
        price 23.50: two of 30, 40, 50, 60; the limit is 40, 50 or 60
        price 985:   only 990 is left: no limit
    """
    limits = [limit for limit in _LIMITS if limit > price][:4]
    return max(rng.sample(limits, 2)) if len(limits) >= 2 else NO_LIMIT


def _goal(template: _Template, number: int, weight: float) -> Goal:
    options: tuple[tuple[str, str], ...] | tuple[str, ...]
    text = template.instruction.text
    if template.instruction.options is None:
        options = template.options(number)
        text += " with " + ", and ".join(f"{name}: {value}" for name, value in options) if options else ""
    else:
        options = template.instruction.options
    if template.price_upper != NO_LIMIT:
        text += f", and price lower than {template.price_upper:.2f} dollars"
    return Goal(template.product, text, template.instruction.attributes, template.price_upper, options, weight)
