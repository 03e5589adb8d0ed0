"""Every recipe for GPUs fits the cards that it is for, with room, and its timeouts allow the longest episode."""

from __future__ import annotations

from pathlib import Path

import pytest

from anchorage.planning.plan import cards_of, make_plan
from anchorage.planning.shapes import shape_of
from services.config import load_config

CARDS = {
    "alfworld": "2x80",
    "alfworld-hgpo": "2x80",
    "alfworld-graphgpo": "2x80",
    "alfworld-g2po": "2x80",
    "alfworld-7b": "8x80",
    "alfworld-qwen3": "4x80",
    "alfworld-one-gpu": "1x80",
    "alfworld-qwen3-one-gpu": "1x80",
    "alfworld-24gb": "1x24",
    "webshop": "2x80",
    "webshop-hgpo": "2x80",
    "webshop-graphgpo": "2x80",
    "webshop-7b": "8x80",
    "webshop-qwen3": "4x80",
}
ROOM = 0.05
"""Share of each card that stays free."""


@pytest.mark.parametrize("name", CARDS)
def test_the_recipe_fits_its_cards_with_room(name: str) -> None:
    config = load_config(Path(f"configs/{name}.yaml"))
    cards = cards_of(CARDS[name])
    plan = make_plan(config, shape_of(config.model.path), cards)
    assert plan.problems == plan.warnings == []
    assert plan.cards_needed == cards.count
    most = plan.on_first_card if config.rollout.share_gpus else max(plan.rank_total, plan.engine.share)
    assert most < (1 - ROOM) * plan.card


def test_every_recipe_for_gpus_is_planned() -> None:
    recipes = {file.stem: load_config(file) for file in Path("configs").glob("*.yaml")}
    assert {name for name, config in recipes.items() if config.model.dtype == "bfloat16"} == CARDS.keys()
