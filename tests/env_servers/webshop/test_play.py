"""What actions do: the rules of the original, oddities included, and what holds whatever is done."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from env_servers.webshop.pages import Mode
from env_servers.webshop.play import Play, can_be_clicked, clickable_options
from env_servers.webshop.shop import Shop
from tests.env_servers.webshop.small_shop import CHAIR, SOFA, build_shop

LAMPS = [f"b0000001{number:02}" for number in range(12)]


def walk(play: Play, *actions: str) -> float:
    """The score of the last of some actions."""
    return [play.step(action) for action in actions][-1]


def to_chair(play: Play, *actions: str) -> float:
    return walk(play, "search[oak chair]", f"click[{CHAIR}]", *actions)


def test_search_finds_and_pages(play: Play) -> None:
    assert (play.has_search_bar, play.clickables) == (True, ("search",))
    walk(play, "search[wooden lamp]")
    assert (play.has_search_bar, len(play.hits)) == (False, 12)
    assert play.clickables == ("back to search", "next >", *LAMPS[:10])
    walk(play, "click[next >]")
    assert play.clickables == ("back to search", "< prev", "next >", *LAMPS[10:])
    walk(play, "click[Next >]", "click[next >]")
    assert (play.page, play.clickables) == (4, ("back to search", "< prev", "next >"))
    walk(play, "click[< Prev]", "click[< prev]")
    assert play.page == 2


@pytest.mark.parametrize(
    ("query", "asins"),
    [
        ("the of", []),
        (" ", []),
        ("<c> garden", [CHAIR, SOFA, *map(str.upper, LAMPS)]),
        ("<c> garden and more", [CHAIR, SOFA, *map(str.upper, LAMPS)]),
        ("<c>", []),
        ("<q> sofas ", [SOFA]),
        ("<q> dining chairs", [CHAIR]),
        ("<a> living room", [SOFA]),
        ("<a> dummy_attr", []),
        ("<Q> sofas", [SOFA]),
    ],
)
def test_special_searches(play: Play, query: str, asins: list[str]) -> None:
    walk(play, f"search[{query}]")
    assert [product.asin for product in play.hits] == asins
    assert f"(Total results: {len(asins)})" in play.observe("text")


def test_random_search_draws_again_for_every_page_and_is_the_same_in_every_session(small_shop: Shop) -> None:
    first, second = (Play(small_shop, small_shop.goals[0]) for _ in range(2))
    seen = []
    for _ in range(4):
        assert walk(first, "search[<r>]") == walk(second, "search[<r> whatever]") == 0.0
        assert first.hits == second.hits
        assert set(first.hits) == set(small_shop.products)
        seen.append(first.hits)
    walk(first, "click[next >]")
    assert len({*seen, first.hits}) == 5


def test_search_works_on_every_page(play: Play) -> None:
    for page in ("click[description]", "click[buy now]"):
        to_chair(play, page, "search[green sofa]")
        assert (play.page_name, play.page, play.options) == ("search_results", 1, {})
        assert play.hits[0].asin == SOFA


@pytest.mark.parametrize(
    "action",
    [
        "",
        "dance",
        "search",
        "search[]",
        "SEARCH[lamp]",
        " click[< prev]",
        "click[< prev",
        "click(< prev)",
        "click[]",
        "click[next >]",
        "click[set of 3]",
        "click[round [small]]",
        "click[set\nof 2]",
        "click[set of 2\n]",
        "<action>click[< prev]</action>",
        "click[a] click[< prev]",
        "\n",
        "\ud800",
    ],
)
@pytest.mark.parametrize("mode", ["text", "text_rich"])
def test_invalid_actions_change_nothing(play: Play, mode: Mode, action: str) -> None:
    to_chair(play, "click[one]")
    before = (play.observe(mode), play.clickables, play.digest(mode))
    assert play.step(action) == 0.0
    assert (play.observe(mode), play.clickables, play.digest(mode)) == before


def test_click_on_search_does_nothing(play: Play) -> None:
    before = play.digest("text")
    walk(play, "click[search]", "click[Search]")
    assert play.digest("text") == before


@pytest.mark.parametrize("action", ["click[< prev] please", "click[< PREV]", "click[< prev]\nsearch[lamp]"])
def test_text_after_the_last_bracket_and_case_of_the_argument_are_ignored(play: Play, action: str) -> None:
    to_chair(play, action)
    assert play.page_name == "search_results"


def test_options(play: Play) -> None:
    to_chair(play, "click[Red | Black]", "click[set of 2]")
    assert play.options == {"color": "red | black", "size": "set of 2"}
    walk(play, "click[antique graywash]", "click[one]")
    assert play.options == {"color": "antique graywash", "size": "set of 2", "style": "one"}


def test_values_that_cannot_be_chosen(small_shop: Shop) -> None:
    """One called like a button is that button, one with a bracket is no action, a shared one sets the last option."""
    chair = small_shop.by_asin[CHAIR]
    assert clickable_options(chair) == {
        "antique graywash": "color",
        "red | black": "color",
        'café "noir"': "color",
        "set of 2": "size",
        "one": "style",
        "plain": "style",
    }
    assert not can_be_clicked("search")
    assert can_be_clicked("a]b")


def test_sub_pages_keep_the_options_and_results_forget_them(play: Play) -> None:
    to_chair(play, "click[one]", "click[features]")
    assert (play.page_name, play.clickables) == ("item_sub_page", ("back to search", "< prev"))
    assert "Warm light" in play.observe("text")
    walk(play, "click[< prev]")
    assert (play.page_name, play.options) == ("item_page", {"style": "one"})
    walk(play, "click[< prev]", f"click[{CHAIR.lower()}]")
    assert play.options == {}


def test_attributes_button(small_shop: Shop) -> None:
    plain, rich = (Play(small_shop, small_shop.goals[0], attributes_button=shown) for shown in (False, True))
    to_chair(plain, "click[attributes]")
    assert plain.page_name == "item_page"
    to_chair(rich, "click[attributes]")
    assert "solid wood [SEP] easy clean [SEP] garden" in rich.observe("text")


def test_back_to_search_forgets_the_visited_products(play: Play) -> None:
    to_chair(play, "click[< prev]")
    assert f"[clicked button] {CHAIR}" in play.observe("text_rich")
    walk(play, "search[oak chair]")
    assert f"[clicked button] {CHAIR}" in play.observe("text_rich")
    walk(play, "click[back to search]", "search[oak chair]")
    assert f"\n[button] {CHAIR}" in play.observe("text_rich")


def test_rich_text_finds_clicked_options_in_the_url(play: Play) -> None:
    to_chair(play, "click[one]", 'click[café "noir"]')
    text = play.observe("text_rich")
    assert text.startswith("You have clicked one.\nYou have clicked one.\nInstruction:")  # it stands for both options
    assert '  [button] café "noir" [button_]' in text  # neither the accent nor the quotes are in the URL as they are
    walk(play, 'search["plain" oak chair]', f"click[{CHAIR}]")
    assert play.observe("text_rich").startswith("You have clicked plain.\nInstruction:")


def test_search_words_that_are_page_names_mislead_prev(play: Play) -> None:
    walk(play, "search[oak chair search_results]", f"click[{CHAIR}]", "click[< prev]")
    assert (play.page_name, play.page, play.listed) == ("search_results", 0, ())
    walk(play, "search[oak chair item_page]", f"click[{CHAIR}]", "click[description]", "click[< prev]")
    assert (play.page_name, play.page) == ("search_results", 1)


def test_buying(play: Play) -> None:
    score = to_chair(play, "click[red | black]", "click[set of 2]", "click[plain]", "click[buy now]")
    bought = play.purchase
    assert bought is not None
    assert (score, bought.reward.score, bought.product.asin) == (1.0, 1.0, CHAIR)
    assert bought.options == {"color": "red | black", "size": "set of 2", "style": "plain"}
    assert 55.0 <= bought.price <= 75.5
    assert (play.page_name, play.clickables) == ("done", ())
    assert play.observe("text").startswith("Thank you for shopping with us!")


def test_buying_less_than_was_asked_for(play: Play) -> None:
    assert to_chair(play, "click[buy now]") == pytest.approx(2 / 5)


def test_digests_tell_states_apart(small_shop: Shop) -> None:
    """Page, query, page number, product and options count; the way there does not."""
    play = Play(small_shop, small_shop.goals[0])
    digests = [play.digest("text")]
    for action in (
        "search[oak chair]",
        "search[wooden chair]",
        "click[next >]",
        "click[< prev]",
        f"click[{CHAIR}]",
        "click[one]",
        "click[description]",
        "click[< prev]",
        "click[set of 2]",
        "click[buy now]",
        "search[oak chair]",
    ):
        play.step(action)
        digests.append(play.digest("text"))
    assert digests[4] == digests[2]
    assert digests[8] == digests[6]
    assert digests[11] == digests[1]
    assert len(set(digests)) == len(digests) - 3
    other = Play(small_shop, small_shop.goals[0])
    walk(other, "search[oak chair]")
    assert other.digest("text") == play.digest("text")
    assert other.digest("text_rich") != play.digest("text_rich")  # that one has been visited


SHOP = build_shop()
WORDS = st.text(st.characters(exclude_categories=()), max_size=12)
ACTIONS = st.one_of(
    st.integers(0, 40),
    st.sampled_from(
        ["search[oak chair]", "search[wooden lamp]", "search[<r>]", "search[<c> garden]", "search[item_page]"]
    ),
    WORDS,
    WORDS.map(lambda words: f"search[{words}]"),
    WORDS.map(lambda words: f"click[{words}]"),
)


def _take(play: Play, choice: int | str) -> float:
    """A number chooses among what can be clicked now."""
    clickables = play.clickables
    if isinstance(choice, str):
        return play.step(choice)
    return play.step(f"click[{clickables[choice % len(clickables)]}]") if clickables else play.step("search[oak]")


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, max_size=25), st.lists(ACTIONS, max_size=25), st.sampled_from(["text", "text_rich"]))
def test_any_actions(choices: list[int | str], others: list[int | str], mode: Mode) -> None:
    """Nothing raises, the same actions give the same episode, and another session's actions change nothing."""
    alone, beside, neighbour = (Play(SHOP, SHOP.goals[1]) for _ in range(3))
    neighbours = iter(others)
    for choice in choices:
        score = _take(alone, choice)
        _take(neighbour, next(neighbours, 0))
        assert _take(beside, choice) == score
        assert (beside.observe(mode), beside.clickables) == (alone.observe(mode), alone.clickables)
        assert beside.digest(mode) == alone.digest(mode)
        assert 0.0 <= score <= 1.0
        assert score == 0.0 or alone.page_name == "done"
