"""The parts of a reward, and the oddities of the original's."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from env_servers.webshop.colours import COLOURS, normalise_colour
from env_servers.webshop.goals import Goal
from env_servers.webshop.nouns import word_nouns
from env_servers.webshop.products import Product, make_products
from env_servers.webshop.reward import Reward, compute_reward, meets_option

Record = Callable[..., dict[str, Any]]


@pytest.fixture
def make(record: Record) -> Callable[..., Product]:
    """Makes a product: `make(name, attributes, **fields of the record)`."""

    def one(name: str, attributes: tuple[str, ...] = ("easy clean",), **fields: Any) -> Product:
        (product,) = make_products([record("B1", name, **fields)], {"B1": {"attributes": list(attributes)}}, {})
        return product

    return one


def _goal(product: Product, *attributes: str, options: tuple[Any, ...] = (), upper: float = 50.0) -> Goal:
    return Goal(product, "", attributes or ("easy clean",), upper, options, 1.0)


def _reward(product: Product, goal: Goal, price: float = 20.0, **options: str) -> Reward:
    return compute_reward(product, goal, price, options, word_nouns)


def test_everything_right(make: Callable[..., Product]) -> None:
    lamp = make("Wooden Lamp")
    reward = _reward(lamp, _goal(lamp, options=(("color", "red"), ("size", "large"))), color="red", size="large")
    assert reward.score == 1.0
    assert reward.parts == {
        "r_type": 1.0,
        "r_att": 1.0,
        "w_att": 0.25,
        "query_match": True,
        "category_match": True,
        "title_score": 1.0,
        "r_option": 1.0,
        "w_option": 0.5,
        "r_price": True,
        "w_price": 0.25,
    }


def test_a_goal_without_options_has_no_such_part(make: Callable[..., Product]) -> None:
    lamp = make("Wooden Lamp")
    assert not {"r_option", "w_option"} & set(_reward(lamp, _goal(lamp)).parts)


def test_parts_add_up(make: Callable[..., Product]) -> None:
    lamp = make("Wooden Lamp")
    goal = _goal(lamp, "easy clean", "gluten free", options=(("color", "red"), ("size", "large")), upper=30.0)
    reward = _reward(lamp, goal, 31.0, color="red")
    assert (reward.r_att, reward.r_option, reward.r_price, reward.r_type) == (0.5, 0.5, False, 1.0)
    assert reward.score == pytest.approx(2 / 5)
    assert reward.score == pytest.approx(
        reward.r_type
        * (reward.r_att * reward.w_att + reward.r_option * reward.w_option + reward.r_price * reward.w_price)
    )


def test_a_price_at_the_limit_is_low_enough(make: Callable[..., Product]) -> None:
    lamp = make("Wooden Lamp")
    assert _reward(lamp, _goal(lamp, upper=20.0), 20.0).r_price
    assert not _reward(lamp, _goal(lamp, upper=20.0), 20.01).r_price


@pytest.mark.parametrize(
    ("title", "fields", "r_type"),
    [
        ("Steel Bench", {"query": "benches"}, 0.0),  # the same category, but no word in common
        ("Wooden Bench", {"query": "benches", "product_category": "A › B"}, 0.5),
        ("Wooden Bench", {"query": "benches"}, 1.0),
        ("Wooden Bench", {"product_category": "A › B"}, 1.0),
        ("Wooden Lamp Tall", {"query": "benches", "product_category": "A › B"}, 1.0),
    ],
)
def test_type(make: Callable[..., Product], title: str, fields: dict[str, str], r_type: float) -> None:
    goal = _goal(make("Wooden Lamp Brass Shade Tall"))
    assert _reward(make(title, **fields), goal).r_type == r_type


def test_a_title_far_off_counts_a_tenth(make: Callable[..., Product]) -> None:
    words = "amber birch copper delta ember fern grove harbor iris jade knot lamp"
    reward = _reward(make("Lamp"), _goal(make(words)))
    assert (reward.r_type, reward.query_match) == (0.1, True)


def test_repeated_words_of_the_goal_count_against_the_title(make: Callable[..., Product]) -> None:
    lamp = make("Lamp Lamp Shade")
    assert _reward(lamp, _goal(lamp)).title_score == pytest.approx(2 / 3)


def test_a_goal_without_nouns_scores_a_fifth(make: Callable[..., Product]) -> None:
    reward = _reward(make("Wooden Lamp"), _goal(make("3 in 1")))
    assert (reward.title_score, reward.r_type) == (0.2, 1.0)


@pytest.mark.parametrize(
    ("fields", "wanted", "found"),
    [
        ({"attributes": ("clean easy",)}, "easy clean", True),
        ({"attributes": ("easy cleaning",)}, "easy cleanin", True),
        ({"attributes": ()}, "wooden lamp", True),
        ({"attributes": (), "full_description": "It is FADE resistant"}, "fade resistant", True),
        ({"attributes": (), "small_description": ["fade ", "resistant"]}, "fade  resistant", True),
        ({"attributes": ()}, "fade resistant", False),
    ],
)
def test_attributes(make: Callable[..., Product], fields: dict[str, Any], wanted: str, found: bool) -> None:
    assert _reward(make("Wooden Lamp", **fields), _goal(make("Wooden Lamp"), wanted)).r_att == float(found)


@pytest.mark.parametrize(
    ("value", "wanted", "met"),
    [
        ("antique graywash", ("color", "antique graywash"), False),  # reduced to `ash`, which the pair does not hold
        ("gray", ("color", "antique gray"), True),
        ("dark plum", ("color", "dark green"), True),
        ("red", ("color", "red"), True),
        ("color", ("color", "blue green"), True),
        ("color", ("color", "blue"), False),  # this pair is `blue`
        ("x-large", ("size", "large"), False),
        ("large", ("size", "x-large"), True),
        ("dark plum", "dark red", True),  # human goals: both become `dark`
        ("café", ("flavor", "caf"), True),  # Latin-1 letters are dropped
    ],
)
def test_options_as_the_original_compares_them(value: str, wanted: Any, met: bool) -> None:
    assert meets_option(value, wanted) is met


def test_colours() -> None:
    assert (len(COLOURS), normalise_colour("graywash"), normalise_colour("size 9")) == (102, "ash", "size 9")
    assert normalise_colour(("color", "black")) == "black"
    assert normalise_colour(("color", "jet black")) == ("color", "jet black")


def test_scores_stay_in_range(make: Callable[..., Product]) -> None:
    rng = random.Random(0)
    lamps = [make(title) for title in ("Wooden Lamp", "Red Chair", "3 in 1", "")]
    for _ in range(200):
        goal = _goal(rng.choice(lamps), options=(("color", rng.choice(COLOURS)),), upper=rng.choice((10.0, 50.0)))
        assert 0.0 <= _reward(rng.choice(lamps), goal, color=rng.choice(COLOURS)).score <= 1.0
