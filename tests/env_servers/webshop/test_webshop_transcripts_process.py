"""Prices, goals and nouns of the official products against those of the recorded process."""

from __future__ import annotations

import hashlib
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest

from env_servers.webshop.goals import draw_prices, synthetic_goals
from env_servers.webshop.nouns import word_nouns
from env_servers.webshop.official import load_official
from tests import needs


def _recorded(reference: Path, name: str) -> Any:
    file = reference / name
    if not file.is_file():
        pytest.skip(needs.TRANSCRIPTS)
    return json.loads(lzma.decompress(file.read_bytes()))


def test_prices_and_goals_of_the_recorded_process(reference: Path, official_folder: Path) -> None:
    recorded = _recorded(reference, "webshop_process.json.xz")
    products = load_official(official_folder)
    rng = random.Random(recorded["seed"])
    prices = draw_prices(products, rng)
    goals = synthetic_goals(products, prices, rng)
    assert prices == recorded["prices"]
    assert [
        [
            goal.product.asin,
            goal.price_upper,
            hashlib.sha256(goal.instruction.encode()).hexdigest()[:16],
            round(goal.weight, 12),
        ]
        for goal in goals
    ] == recorded["goals"]


def test_nouns_of_all_official_titles(reference: Path, official_folder: Path) -> None:
    recorded = _recorded(reference, "webshop_title_nouns.json.xz")
    assert {product.asin: word_nouns(product.title) for product in load_official(official_folder)} == recorded
