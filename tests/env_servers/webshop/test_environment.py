"""WebShop as an environment: what a reset and a step say, and which settings change it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from env_servers.environment import BrokenTask, UnknownTask
from env_servers.protocol import FREE_TEXT, ResetRequest, StepRequest
from env_servers.registry import load_environment
from env_servers.sessions.table import SessionTable
from env_servers.webshop.environment import TEST_GOALS, WebShop
from env_servers.webshop.goals import Goals
from env_servers.webshop.shop import Shop

pytestmark = pytest.mark.usefixtures("plain_surroundings")

Surround = Callable[..., None]


def test_registered_and_described(generated_shop: Shop) -> None:
    assert load_environment("webshop") is WebShop
    assert WebShop.splits() == {"train": len(generated_shop.goals) - TEST_GOALS, "test": TEST_GOALS}
    about = dict(WebShop.about())
    assert len(about.pop("fingerprint")) == 32
    assert about == {
        "engine": "native, text observations, nouns by stop words",
        "source": "generated, synthetic goals",
    }


def test_the_fingerprint_tells_settings_apart(plain_surroundings: Surround) -> None:
    """What the shop itself decides is in its digest: see `test_opening`."""
    found = [WebShop.about()["fingerprint"]]
    for name, value in (("reward", "score"), ("attributes", "true"), ("observation", "text_rich")):
        plain_surroundings(**{name: value})
        found.append(WebShop.about()["fingerprint"])
    assert len(set(found)) == 4


def test_what_agentgym_asks_a_shop_for() -> None:
    shop = WebShop()
    seen = shop.reset("train", 0, expert=True)
    assert (shop.has_search_bar, shop.clickables) == (True, ("search",))
    shop.step(str(seen.expert))
    assert shop.has_search_bar is False
    assert shop.clickables[:2] == ("back to search", "next >")


def test_splits_never_overlap(generated_shop: Shop) -> None:
    """`test` is the first 500 goals, `train` the rest in the same order."""
    goals: Goals = generated_shop.goals
    environment = WebShop()
    for split, index, number in (("test", 0, 0), ("test", 499, 499), ("train", 0, 500), ("train", 7, 507)):
        assert environment.reset(split, index).facts["goal"] == goals[number].instruction
    last = WebShop.splits()["train"] - 1
    assert environment.reset("train", last).facts["goal"] == goals[len(goals) - 1].instruction


@pytest.mark.parametrize(("split", "index"), [("eval", 0), ("test", 500), ("train", -1)])
def test_unknown_task(split: str, index: int) -> None:
    with pytest.raises(UnknownTask):
        WebShop().reset(split, index)


def test_reset() -> None:
    seen = WebShop().reset("train", 3)
    assert seen.text == f"WebShop [SEP] Instruction: [SEP] {seen.facts['goal']} [SEP] Search"
    assert (seen.reward, seen.terminated, seen.truncated, seen.expert) == (0.0, False, False, None)
    assert seen.admissible == (f"search[{FREE_TEXT}]",)
    assert (seen.facts["won"], seen.facts["score"]) == (False, 0.0)
    assert seen.facts["task_type"] in {"beauty", "electronics", "fashion", "garden", "grocery"}


def test_following_the_expert_wins() -> None:
    environment = WebShop()
    seen = environment.reset("test", 1, expert=True)
    assert str(seen.expert).startswith("search[")
    for _ in range(15):
        seen = environment.step(str(seen.expert))
        if seen.terminated:
            break
        assert seen.admissible is not None
        assert list(seen.admissible) == sorted(set(seen.admissible))
        assert seen.expert in seen.admissible
        assert "purchase" not in seen.facts
    assert (seen.reward, seen.terminated, seen.admissible, seen.expert) == (1.0, True, (), None)
    assert (seen.facts["won"], seen.facts["score"]) == (True, 1.0)


@pytest.mark.parametrize("reward", ["success", "score"])
def test_buying_the_wrong_thing(plain_surroundings: Surround, reward: str) -> None:
    plain_surroundings(reward=reward)
    environment = WebShop()
    seen = environment.reset("train", 0, expert=True)
    seen = environment.step(str(seen.expert))
    seen = environment.step(next(action for action in seen.admissible or () if action.startswith("click[b0")))
    seen = environment.step("click[buy now]")
    facts = seen.facts
    parts, purchase = facts["reward_parts"], facts["purchase"]
    assert isinstance(parts, dict)
    assert isinstance(purchase, dict)
    assert {"r_type", "r_att", "r_price", "title_score", "w_att", "w_price"} <= set(parts)
    assert set(purchase) == {"asin", "options", "price"}
    assert (seen.terminated, facts["won"]) == (True, False)
    assert 0.0 < float(str(facts["score"])) < 1.0
    assert seen.reward == (facts["score"] if reward == "score" else 0.0)
    assert json.loads(json.dumps(facts)) == facts


def test_reset_again_and_in_another_session_is_the_same() -> None:
    environment = WebShop()
    first = environment.reset("train", 7, expert=True)
    environment.step(str(first.expert))
    assert environment.reset("train", 7, expert=True) == first
    assert WebShop().reset("train", 7, expert=True) == first


def test_rich_observations(plain_surroundings: Surround) -> None:
    plain_surroundings(observation="text_rich", attributes="true")
    environment = WebShop()
    seen = environment.reset("train", 0, expert=True)
    assert seen.text.startswith("WebShop\nInstruction: \n")
    assert "text_rich" in WebShop.about()["engine"]
    while "click[buy now]" not in (seen.admissible or ()):
        seen = environment.step(str(seen.expert))
    assert "click[attributes]" in (seen.admissible or ())


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"reward": "money"}, r"invalid WEBSHOP_… variable: reward: Input should be 'success' or 'score'"),
        ({"seed": "x"}, "seed: Input should be a valid integer"),
        ({"goals": "human"}, "human goals need the official files"),
        ({"data": "/nowhere"}, "not a directory: /nowhere"),
    ],
)
def test_impossible_settings_are_one_clear_line(
    plain_surroundings: Surround, variables: dict[str, str], complaint: str
) -> None:
    plain_surroundings(**variables)
    with pytest.raises(BrokenTask, match=complaint) as raised:
        WebShop.about()
    assert "\n" not in str(raised.value)


def test_official_files(plain_surroundings: Surround, official_folder: Path) -> None:
    plain_surroundings(data=str(official_folder), goals="human", products="1000", seed="5")
    assert WebShop.about()["source"] == "official, human goals"
    goal = WebShop().reset("test", 0).facts["goal"]
    assert "price lower than" in str(goal)


async def test_behind_a_session_table() -> None:
    """Truncation is the table's; `state` anchors are equal for equal states."""
    table = SessionTable(WebShop)
    anchors = []
    for _ in range(2):
        seen = await table.reset(ResetRequest(split="train", index=2, anchor="state", max_steps=2, expert=True))
        anchors.append(seen.anchor)
        for step in (1, 2):
            seen = await table.step(StepRequest(session=seen.session, step=step, action=str(seen.expert)))
            anchors.append(seen.anchor)
        assert (seen.truncated, seen.terminated) == (True, False)
    assert anchors[:3] == anchors[3:]
    assert len(set(anchors)) == 3
