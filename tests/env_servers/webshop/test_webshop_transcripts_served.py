"""The recorded episodes again, as clients play them: through the step API and through AgentGym's routes.

With the recording process's seed the shop draws its very prices and price limits, so nothing has to be set.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import pytest

from env_servers.clients.local import LocalClient
from env_servers.protocol import ResetRequest, StepResult
from env_servers.server.app import create_app
from env_servers.server.settings import ServerSettings
from env_servers.webshop import environment
from env_servers.webshop.environment import TEST_GOALS, WebShop
from env_servers.webshop.load import open_shop
from env_servers.webshop.settings import WebShopSettings
from env_servers.webshop.shop import Shop
from tests import needs

Episode = Mapping[str, Any]
Surround = Callable[..., None]

THROUGH_AGENTGYM = 12


@pytest.fixture(scope="module")
def recorded_shop(reference: Path, official_folder: Path) -> Shop:
    file = reference / "webshop_process.json.xz"
    if not file.is_file():
        pytest.skip(needs.TRANSCRIPTS)
    seed = json.loads(lzma.decompress(file.read_bytes()))["seed"]
    return open_shop(WebShopSettings(data=official_folder, tagger="stop-words", seed=seed))


@pytest.fixture(scope="module")
def episodes(reference: Path, recorded_shop: Shop) -> list[Episode]:
    """Those that the process of the seed recorded."""
    files = sorted(reference.glob("webshop_transcripts*.jsonl.xz"))
    lines = (line for file in files for line in lzma.decompress(file.read_bytes()).splitlines())
    found = [episode for episode in map(json.loads, lines) if _is_of(recorded_shop, episode)]
    if not found:
        pytest.skip(needs.TRANSCRIPTS)
    return found


@pytest.fixture
def serve_recorded(
    plain_surroundings: Surround, recorded_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Sells what was recorded, from now on with these settings."""
    monkeypatch.setattr(environment, "open_shop", lambda _: recorded_shop)
    return plain_surroundings


def _is_of(shop: Shop, episode: Episode) -> bool:
    drawn = all(shop.prices[asin] == price for asin, price in episode["price_of"].items())
    return drawn and shop.goals[episode["goal"]["index"]].price_upper == episode["goal"]["price_upper"]


def _mode(episode: Episode) -> tuple[str, bool]:
    return episode["mode"], episode["show_attrs"]


def _agrees(recorded: Mapping[str, Any], key: str, value: object, text: str) -> bool:
    if f"{key}_sha256" in recorded:
        return bool(recorded[f"{key}_sha256"] == hashlib.sha256(text.encode()).hexdigest())
    return bool(recorded[key] == value)


async def _play(client: LocalClient, episode: Episode) -> list[str]:
    """Return the differences between the step API and the recording, one line each."""
    number = episode["goal"]["index"]
    split, index = ("test", number) if number < TEST_GOALS else ("train", number - TEST_GOALS)
    seen = await client.reset(ResetRequest(split=split, index=index))
    found = []
    for step in episode["steps"]:
        if step["action"] is not None:
            seen = await client.step(seen.session, seen.step + 1, step["action"])
        found += [f"episode {episode['id']} step {seen.step}: {what}" for what in _disagreements(step, seen)]
    await client.close_session(seen.session)
    return found


def _disagreements(step: Mapping[str, Any], seen: StepResult) -> list[str]:
    agree = {
        "observation": _agrees(step, "observation", seen.observation, seen.observation),
        "reward": (seen.reward, seen.facts["score"]) == (step["reward"], step["reward"]),
        "done": (seen.terminated, seen.truncated) == (step["done"], False),
        "parts": seen.facts.get("reward_parts") == step.get("reward_breakdown"),
        "purchase": seen.facts.get("purchase") == step.get("purchase"),
        "won": seen.facts["won"] is (step["reward"] == 1.0),
    }
    return [what for what, agrees in agree.items() if not agrees]


async def test_every_recorded_step_through_the_step_api(serve_recorded: Surround, episodes: list[Episode]) -> None:
    found, bought = [], 0
    for (mode, attributes), several in groupby(sorted(episodes, key=_mode), key=_mode):
        serve_recorded(observation=mode, attributes=str(attributes).lower(), reward="score")
        client = LocalClient(WebShop)
        for episode in several:
            found += await _play(client, episode)
            bought += "reward_breakdown" in episode["steps"][-1]
        await client.close()
    assert found == []
    assert bought > 0


async def test_recorded_episodes_through_agentgym(serve_recorded: Surround, episodes: list[Episode]) -> None:
    serve_recorded(reward="score")
    sizes = WebShop.splits()
    app = create_app(WebShop, ServerSettings(token=None))
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://server/agentgym") as http,
    ):
        env = {"env_idx": (await http.post("/create")).json()}
        for episode in [episode for episode in episodes if _mode(episode) == ("text", False)][:THROUGH_AGENTGYM]:
            number = episode["goal"]["index"]
            task = number - TEST_GOALS if number >= TEST_GOALS else sizes["train"] + number
            answer = (await http.post("/reset", json={**env, "session_id": task})).json()
            told = {"state": answer[0], "reward": 0.0, "done": False, "info": None}
            for step in episode["steps"]:
                if step["action"] is not None:
                    told = (await http.post("/step", json={**env, "action": step["action"]})).json()
                assert _agrees(step, "observation", told["state"], told["state"]), (episode["id"], step["action"])
                assert (told["reward"], told["done"], told["info"]) == (step["reward"], step["done"], step["info"])
                actions = (await http.get("/available_actions", params=env)).json()
                recorded = step["available_actions"]
                assert actions["has_search_bar"] == recorded["has_search_bar"]
                assert _agrees(recorded, "clickables", actions["clickables"], "\n".join(actions["clickables"]))
