"""The goals of a shop, and the prices they are about.

Invariants
- Prices and price limits come from one seeded generator, in the order of the products, and the order of the goals from
  the seed 233 of the original: the same products and seed give the same goals in every process.
- A goal is made when it is asked for: what is stored is one wish for a product and a number for each of its goals.
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
        product: the product that the wish was made from. Others may do as well.
        instruction: the wish in words.
        price_upper: highest price in dollars.
        options: (name, value) pairs, of human goals values only.
        weight: how likely the original is to draw the goal where none is named.
    """

    product: Product
    instruction: str
    attributes: tuple[str, ...]
    price_upper: float
    options: tuple[tuple[str, str], ...] | tuple[str, ...]
    weight: float


@dataclass(frozen=True, slots=True)
class _Wish:
    """One instruction with its price limit, for all combinations of the product's options."""

    product: Product
    instruction: Instruction
    price_upper: float

    @property
    def goals(self) -> int:
        if self.instruction.options is not None:
            return 1
        return math.prod(len(values) for values in self.product.options.values())

    def options(self, number: int) -> tuple[tuple[str, str], ...]:
        """Combination `number` of the options, names sorted, the last one varying fastest."""
        chosen: list[tuple[str, str]] = []
        for name in sorted(self.product.options, reverse=True):
            number, place = divmod(number, len(self.product.options[name]))
            chosen.append((name, self.product.options[name][place]))
        return tuple(reversed(chosen))


class Goals(Sequence[Goal]):
    """All goals of a shop, in their fixed order."""

    def __init__(self, wishes: Sequence[_Wish]) -> None:
        self._wishes = [wish for wish in wishes if wish.goals]
        self._ends = list(accumulate(wish.goals for wish in self._wishes))
        self._order = array("Q", range(self._ends[-1] if self._ends else 0))
        random.Random(SHUFFLE_SEED).shuffle(self._order)
        self._uses: Counter[str] = Counter()
        for wish in self._wishes:
            for attribute in wish.instruction.attributes:
                self._uses[attribute] += wish.goals

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Goal:  # type: ignore[override]
        number = self._order[index]
        place = bisect_right(self._ends, number)
        wish = self._wishes[place]
        first = self._ends[place - 1] if place else 0
        return _goal(wish, number - first, self._weight(wish.instruction))

    def __iter__(self) -> Iterator[Goal]:
        return (self[index] for index in range(len(self)))

    def limits(self) -> Iterator[tuple[str, float]]:
        """Asin and price limit of every wish, in the products' order."""
        return ((wish.product.asin, wish.price_upper) for wish in self._wishes)

    def _weight(self, instruction: Instruction) -> float:
        if instruction.options is not None:
            return 1.0
        return sum(1.0 / self._uses[a] for a in instruction.attributes) / len(instruction.attributes)


def draw_prices(products: Sequence[Product], rng: random.Random) -> dict[str, float]:
    """The price of every product by asin: of a range any price in it, in the products' order."""
    return {p.asin: rng.uniform(*p.prices) if len(p.prices) == 2 else p.prices[0] for p in products}


def synthetic_goals(products: Sequence[Product], prices: Mapping[str, float], rng: random.Random) -> Goals:
    """A goal for every combination of options of every product with an instruction."""
    return Goals(
        [
            _Wish(product, product.instruction, _draw_limit(prices[product.asin], rng))
            for product in products
            if product.instruction is not None and product.instruction.attributes
        ]
    )


def human_goals(products: Sequence[Product], prices: Mapping[str, float], rng: random.Random) -> Goals:
    """A goal for every crowd-written instruction that asks for some attribute."""
    return Goals(
        [
            _Wish(product, instruction, _draw_limit(prices[product.asin], rng))
            for product in products
            for instruction in product.human
            if instruction.attributes
        ]
    )


def _draw_limit(price: float, rng: random.Random) -> float:
    """The higher of two of the next four multiples of ten dollars; no limit where there are not two of them."""
    limits = [limit for limit in _LIMITS if limit > price][:4]
    return max(rng.sample(limits, 2)) if len(limits) >= 2 else NO_LIMIT


def _goal(wish: _Wish, number: int, weight: float) -> Goal:
    options: tuple[tuple[str, str], ...] | tuple[str, ...]
    text = wish.instruction.text
    if wish.instruction.options is None:
        options = wish.options(number)
        text += " with " + ", and ".join(f"{name}: {value}" for name, value in options) if options else ""
    else:
        options = wish.instruction.options
    if wish.price_upper != NO_LIMIT:
        text += f", and price lower than {wish.price_upper:.2f} dollars"
    return Goal(wish.product, text, wish.instruction.attributes, wish.price_upper, options, weight)
