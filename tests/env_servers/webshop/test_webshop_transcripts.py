"""The shop against episodes recorded from the original, step by step.

The transcripts are read from `REFERENCE_DIR`, the products from `WEBSHOP_DATA`. Both forms of a transcript are
understood: with texts, and with their SHA-256 instead.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import lzma
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from env_servers.webshop.goals import NO_LIMIT, Goal
from env_servers.webshop.load import open_shop
from env_servers.webshop.play import Play
from env_servers.webshop.settings import WebShopSettings
from env_servers.webshop.shop import Shop
from tests import needs

Episode = Mapping[str, Any]
Step = Mapping[str, Any]


@pytest.fixture(scope="module")
def episodes(reference: Path) -> list[Episode]:
    files = sorted(reference.glob("webshop_transcripts*.jsonl.xz"))
    if not files:
        pytest.skip(needs.TRANSCRIPTS)
    return [json.loads(line) for file in files for line in lzma.open(file, "rt", encoding="utf-8")]


@pytest.fixture(scope="module")
def shop(official_folder: Path) -> Shop:
    return open_shop(WebShopSettings(data=official_folder, tagger="stop-words"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _goal(shop: Shop, recorded: Mapping[str, Any]) -> Goal:
    """The shop's own goal of that number, with the price limit of the recording process."""
    goal = shop.goals[recorded["index"]]
    assert goal.product.asin == recorded["asin"]
    assert dict(goal.options) == recorded["goal_options"]
    assert list(goal.attributes) == recorded["attributes"]
    upper = recorded["price_upper"]
    instruction = goal.instruction.partition(", and price lower than ")[0]
    if upper != NO_LIMIT:
        instruction += f", and price lower than {upper:.2f} dollars"
    assert recorded.get("instruction_text", instruction) == instruction
    return dataclasses.replace(goal, price_upper=upper, instruction=instruction)


def disagreements(episode: Episode, shop: Shop) -> list[str]:
    """Return the differences between the shop and the transcript, one line each."""
    priced = copy.copy(shop)
    priced.prices = {**shop.prices, **episode["price_of"]}
    play = Play(priced, _goal(shop, episode["goal"]), attributes_button=episode["show_attrs"])
    found = []
    for number, step in enumerate(episode["steps"]):
        score = 0.0 if step["action"] is None else play.step(step["action"])
        for what, agrees in _compare(play, step, score, play.observe(episode["mode"])).items():
            if not agrees:
                found.append(f"episode {episode['id']} step {number} {step['action']!r}: {what}")
    return found


def _compare(play: Play, step: Step, score: float, observation: str) -> dict[str, bool]:
    """Every thing that a step records, and whether the play says the same."""
    clickables = list(play.clickables)
    available = {**step, **step["available_actions"]}
    agree = {
        "observation": _agrees(step, "observation", observation, observation),
        "clickables": _agrees(available, "clickables", clickables, "\n".join(clickables)),
        "search bar": play.has_search_bar == available["has_search_bar"],
        "reward": score == step["reward"],
        "done": (play.page_name == "done") == step["done"],
    }
    if "reward_breakdown" in step:
        bought = play.purchase
        assert bought is not None
        purchase = {"asin": bought.product.asin, "options": bought.options, "price": bought.price}
        agree["reward parts"] = bought.reward.parts == step["reward_breakdown"]
        agree["purchase"] = purchase == step["purchase"]
    return agree


def _agrees(recorded: Mapping[str, Any], key: str, value: object, hashed: str) -> bool:
    if f"{key}_sha256" in recorded:
        return bool(recorded[f"{key}_sha256"] == _sha256(hashed))
    return bool(recorded[key] == value)


def _without_texts(episode: Episode) -> Episode:
    """The same episode as it is recorded where hashes stand for the texts."""
    kept = ("index", "asin", "goal_options", "attributes", "price_upper")
    return {
        **episode,
        "goal": {key: episode["goal"][key] for key in kept},
        "steps": [_step_without_texts(step) for step in episode["steps"]],
    }


def _step_without_texts(step: Step) -> Step:
    if "observation_sha256" in step:
        return step
    actions = step["available_actions"]
    hashed = {**actions, "clickables_sha256": _sha256("\n".join(actions["clickables"]))}
    del hashed["clickables"]
    rest = {key: value for key, value in step.items() if key != "observation"}
    return {**rest, "observation_sha256": _sha256(step["observation"]), "available_actions": hashed}


def _all(episodes: Iterable[Episode], shop: Shop) -> list[str]:
    return [line for episode in episodes for line in disagreements(episode, shop)]


def test_every_step_of_every_transcript(episodes: list[Episode], shop: Shop) -> None:
    assert sum(len(episode["steps"]) for episode in episodes) > 100
    assert any("reward_breakdown" in step for episode in episodes for step in episode["steps"])
    assert _all(episodes, shop) == []


def test_transcripts_of_hashes(episodes: list[Episode], shop: Shop) -> None:
    hashed = [_without_texts(episode) for episode in episodes]
    assert _all(hashed, shop) == []


def test_a_wrong_transcript_is_found_out(episodes: list[Episode], shop: Shop) -> None:
    finished = next(episode for episode in episodes if episode["steps"][-1]["done"])
    wrong = copy.deepcopy(_without_texts(finished))
    wrong["steps"][0]["observation_sha256"] = _sha256("something else")
    wrong["steps"][0]["available_actions"]["clickables_sha256"] = _sha256("")
    wrong["steps"][-1]["reward_breakdown"]["title_score"] += 0.1
    wrong["steps"][-1]["reward"] += 0.1
    found = {line.rpartition(": ")[2] for line in disagreements(wrong, shop)}
    assert found == {"observation", "clickables", "reward parts", "reward"}
