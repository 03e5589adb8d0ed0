"""Goals and prices of any shop. The recorded ones: see `test_webshop_transcripts_process`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from env_servers.webshop.goals import NO_LIMIT, draw_prices, human_goals, synthetic_goals
from env_servers.webshop.products import make_products

Record = Callable[..., dict[str, Any]]


def _notes(asin: str, *attributes: str) -> dict[str, Any]:
    return {asin: {"attributes": list(attributes), "instruction": "Find me it", "instruction_attributes": attributes}}


def test_a_goal_for_every_combination(record: Record) -> None:
    choices = {"Size": [{"value": "S"}, {"value": "M"}, {"value": "L"}], "Color": [{"value": "Red"}, {"value": "Tan"}]}
    products = list(make_products([record("B1", customization_options=choices)], _notes("B1", "soft"), {}))
    goals = synthetic_goals(products, {"B1": 5.0}, random.Random(0))
    assert len(goals) == 6
    assert {goal.options for goal in goals} == {
        (("color", colour), ("size", size)) for colour in ("red", "tan") for size in ("s", "m", "l")
    }
    assert all(goal.weight == 1 / 6 for goal in goals)
    first = goals[0]
    (_, colour), (_, size) = first.options
    limit = f"{first.price_upper:.2f}"
    assert (
        first.instruction == f"Find me it with color: {colour}, and size: {size}, and price lower than {limit} dollars"
    )


def test_an_option_without_values_makes_no_goal(record: Record) -> None:
    records = [record("B1", customization_options={"Size": [], "Color": [{"value": "Red"}]}), record("B2")]
    products = list(make_products(records, {**_notes("B1", "soft"), **_notes("B2", "soft")}, {}))
    goals = synthetic_goals(products, {"B1": 5.0, "B2": 5.0}, random.Random(0))
    assert [goal.product.asin for goal in goals] == ["B2"]
    assert goals[0].weight == 1.0


@pytest.mark.parametrize(
    ("price", "possible"),
    [(5.0, {20.0, 30.0, 40.0}), (10.0, {30.0, 40.0, 50.0}), (971.0, {990.0}), (980.0, {NO_LIMIT}), (5e3, {NO_LIMIT})],
)
def test_price_limits(record: Record, price: float, possible: set[float]) -> None:
    products = list(make_products([record("B1")], _notes("B1", "soft"), {}))
    goals = [synthetic_goals(products, {"B1": price}, random.Random(seed))[0] for seed in range(60)]
    assert {goal.price_upper for goal in goals} == possible
    assert all(("price lower" in goal.instruction) == (goal.price_upper != NO_LIMIT) for goal in goals)


def test_prices_of_ranges_only_are_drawn(record: Record) -> None:
    products = list(make_products([record("B1", pricing="$3$4"), record("B2", pricing="$9")], {}, {}))
    drawn = [draw_prices(products, random.Random(seed)) for seed in range(20)]
    assert len({prices["B1"] for prices in drawn}) == 20
    assert all(3.0 <= prices["B1"] <= 4.0 and prices["B2"] == 9.0 for prices in drawn)


def test_human_goals(record: Record) -> None:
    written = {
        "B1": [
            {"instruction": "a lamp, please..", "instruction_attributes": ["soft"], "instruction_options": ["red"]},
            {"instruction": "anything", "instruction_attributes": [], "instruction_options": []},
        ]
    }
    products = list(make_products([record("B1"), record("B2")], {}, written))
    goals = human_goals(products, {"B1": 985.0, "B2": 1.0}, random.Random(0))
    assert [(goal.instruction, goal.options, goal.weight) for goal in goals] == [("a lamp, please", ("red",), 1.0)]
