"""The scripted expert wins what can be won, from the start and from wherever other actions left the episode."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from env_servers.webshop.expert import MAX_QUERY_CHARS, Expert, choose_options, choose_query
from env_servers.webshop.goals import Goal, synthetic_goals
from env_servers.webshop.load import open_shop
from env_servers.webshop.nouns import open_tagger
from env_servers.webshop.play import Play, clickable_options
from env_servers.webshop.products import make_products
from env_servers.webshop.reward import meets_option
from env_servers.webshop.search.index import SearchIndex
from env_servers.webshop.settings import WebShopSettings
from env_servers.webshop.shop import Shop
from tests.env_servers.webshop.small_shop import CHAIR, Record

LIMIT = 15


def finish(play: Play, limit: int = LIMIT) -> float:
    """The score of the expert's purchase; every action of his does something."""
    expert = Expert(play)
    score = 0.0
    for _ in range(limit):
        action = expert.next_action()
        if action is None:
            return score
        before = play.digest("text")
        score = play.step(action)
        assert play.digest("text") != before, action
    raise AssertionError("the expert bought nothing")


def wander(play: Play, rng: random.Random, steps: int) -> None:
    """Random clicks and searches, but for buying."""
    for _ in range(steps):
        clicks = [name for name in play.clickables if name not in ("search", "buy now")]
        words = " ".join(rng.sample(play.goal.instruction.split(), 3))
        search = rng.choice([words, words, "<r>", f"<c> {play.goal.product.category}", "the"])
        play.step(f"click[{rng.choice(clicks)}]" if clicks and rng.random() < 0.8 else f"search[{search}]")


def test_expert_wins_nearly_every_generated_goal(generated_shop: Shop) -> None:
    goals = list(generated_shop.goals)[::7]
    won = sum(finish(Play(generated_shop, goal)) == 1.0 for goal in goals)
    assert won >= 0.99 * len(goals)


def test_expert_wins_every_official_goal_that_its_product_can_win(official_folder: Path) -> None:
    """One in fifteen wants an option that no value of its product meets; no other product wins those goals either."""
    shop = open_shop(WebShopSettings(data=official_folder, tagger="stop-words"))
    goals = list(shop.goals)[::5]
    hopeless = []
    for goal in goals:
        values = clickable_options(goal.product)
        if all(any(meets_option(value, wanted) for value in values) for wanted in goal.options):
            assert finish(Play(shop, goal)) == 1.0, goal.instruction
        else:
            hopeless.append(goal)
    assert len(hopeless) < 0.08 * len(goals)
    for goal in hopeless[::5]:
        worth = (shop.reward(product, goal, choose_options(product, goal.options)) for product in shop.products)
        assert all(reward.score < 1.0 for reward in worth), goal.instruction


def test_expert_goes_on_after_other_actions(generated_shop: Shop) -> None:
    rng = random.Random(1)
    goals = list(generated_shop.goals)[::23]
    won = 0
    for goal in goals:
        play = Play(generated_shop, goal, attributes_button=rng.random() < 0.5)
        wander(play, rng, rng.randint(1, 12))
        won += finish(play) == 1.0
    assert won >= 0.98 * len(goals)


def test_random_players_hardly_ever_win(generated_shop: Shop) -> None:
    rng = random.Random(2)
    goals = list(generated_shop.goals)[::23]
    won = 0
    for goal in goals:
        play, score = Play(generated_shop, goal), 0.0
        for _ in range(LIMIT):
            if play.page_name != "done":
                words = " ".join(rng.sample(goal.instruction.split(), 3))
                clicks = [name for name in play.clickables if name != "search"]
                score = play.step(f"click[{rng.choice(clicks)}]" if clicks else f"search[{words}]")
        won += score == 1.0
    assert won < 0.01 * len(goals)


def _goal(shop: Shop, *options: tuple[str, str]) -> Goal:
    return next(goal for goal in shop.goals if goal.options == options)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ((("color", "red | black"), ("size", "set of 2"), ("style", "plain")), None),
        # `one` sets the style only, but it is as good as the size; then the style `plain` cannot be had.
        ((("color", "red | black"), ("size", "one"), ("style", "one")), {"color": "red | black", "style": "one"}),
        # The graywash is taken for `ash`, which no pair holds: it cannot be had at all.
        (
            (("color", "antique graywash"), ("size", "set of 2"), ("style", "plain")),
            {"size": "set of 2", "style": "plain"},
        ),
    ],
)
def test_options_that_score_best(
    small_shop: Shop, wanted: tuple[tuple[str, str], ...], chosen: dict[str, str] | None
) -> None:
    choices = choose_options(small_shop.by_asin[CHAIR], wanted)
    assert choices == (dict(wanted) if chosen is None else chosen)


def test_expert_of_a_goal_that_cannot_be_won_buys_what_comes_nearest(small_shop: Shop) -> None:
    goal = _goal(small_shop, ("color", "antique graywash"), ("size", "set of 2"), ("style", "plain"))
    assert finish(Play(small_shop, goal)) == pytest.approx(4 / 5)


def test_query_is_the_instruction_without_the_price(small_shop: Shop) -> None:
    goal = _goal(small_shop, ("color", "red | black"), ("size", "set of 2"), ("style", "plain"))
    assert "price lower than" in goal.instruction
    query = "find me dining chairs with solid wood with color: red | black, and size: set of 2, and style: plain"
    assert choose_query(small_shop, goal) == query


def test_long_texts_make_no_long_query(record: Callable[..., Record]) -> None:
    long = record("B1", "Wooden Lamp " + "very " * 300, full_description="bright " * 2000)
    notes = {"B1": {"attributes": ["x"], "instruction": "Find me a", "instruction_attributes": ["x"]}}
    (product,) = make_products([long], notes, {})
    goals = synthetic_goals([product], {"B1": 1.0}, random.Random(0))
    shop = Shop(
        [product], {"B1": 1.0}, goals, SearchIndex.build_in_memory([("B1", "hidden")]), open_tagger("stop-words")
    )
    assert len(choose_query(shop, goals[0])) <= MAX_QUERY_CHARS
    assert Expert(Play(shop, goals[0])).next_action() is not None


def test_bracket_in_a_query_is_left_out(small_shop: Shop) -> None:
    goal = _goal(small_shop, ("color", "red | black"), ("size", "round [small]"), ("style", "plain"))
    assert "size: round small , and" in choose_query(small_shop, goal)


def test_nothing_to_do_after_the_purchase(small_shop: Shop) -> None:
    play = Play(small_shop, small_shop.goals[0])
    finish(play)
    assert Expert(play).next_action() is None
