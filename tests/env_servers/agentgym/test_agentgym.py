"""AgentGym's routes, asked as its ALFWorld and WebShop clients ask."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from env_servers.agentgym.shim import Shim
from env_servers.alfworld.environment import AlfWorld
from env_servers.environment import Environment, Observation
from env_servers.server.app import create_app
from env_servers.server.settings import ServerSettings
from env_servers.sessions.table import Busy, SessionTable, SessionUnknown
from env_servers.webshop.environment import WebShop
from tests.env_servers.counting import Counting


class Shop(Counting):
    """Counts with a shop's actions."""

    name = "webshop"

    def step(self, action: str) -> Observation:
        return super().step({"click[More]": "up", "click[Less]": "down"}.get(action, action))

    def _observe(self, reward: float) -> Observation:
        seen = super()._observe(reward)
        return Observation(
            text=seen.text,
            reward=seen.reward,
            terminated=seen.terminated,
            admissible=("click[Less]", "click[More]", "search[<words>]"),
        )


@asynccontextmanager
async def serving(environment: type[Environment]) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(environment, ServerSettings(token=None, max_sessions=4))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server/agentgym") as client:
            yield client


async def test_alfworld_as_its_client_plays_it() -> None:
    async with serving(AlfWorld) as client:
        number = (await client.post("/create")).json()["id"]
        first = (await client.post("/reset", json={"id": number, "game": 0, "world_type": "Text"})).json()
        assert first["id"] == number
        assert first["observation"].startswith("You are in the middle of a room.")
        assert "Your task is to: " in first["observation"]
        assert first["task_type"].startswith("pick_")
        for named in ({"id": number}, {"id": number, "unused": 1}):
            assert (await client.get("/available_actions", params=named)).json() == first["available_actions"]
            assert (await client.get("/observation", params=named)).json() == first["observation"]
        action = first["available_actions"][0]
        second = (await client.post("/step", json={"id": number, "action": action})).json()
        assert set(second) == {"observation", "reward", "available_actions", "done"}
        assert (second["reward"], second["done"]) == (0.0, False)
        assert (await client.get("/observation", params={"id": number})).json() == second["observation"]
        again = (await client.post("/reset", json={"id": number, "game": 0, "world_type": "Text"})).json()
        assert again == first
        assert (await client.post("/close", json={"id": number})).json() == {"closed": True}
        assert (await client.post("/step", json={"id": number, "action": "look"})).status_code == 404


async def test_webshop_as_its_client_plays_it() -> None:
    async with serving(Shop) as client:
        number = (await client.post("/create")).json()
        assert isinstance(number, int)
        text, nothing = (await client.post("/reset", json={"env_idx": number, "session_id": 0})).json()
        assert (text, nothing) == ("The count is 0, the target is 2.", None)
        assert (await client.get("/observation", params={"env_idx": number})).json() == text
        actions = (await client.get("/available_actions", params={"env_idx": number})).json()
        assert actions == {"has_search_bar": True, "clickables": ["Less", "More"]}
        step = {"env_idx": number, "action": "click[More]"}
        assert (await client.post("/step", json=step)).json()["done"] is False
        last = (await client.post("/step", json=step)).json()
        assert last == {"state": "The count is 2, the target is 2.", "reward": 1.0, "done": True, "info": None}
        assert (await client.post("/step", json=step)).status_code == 409
        assert (await client.post("/close", json={"env_idx": number})).status_code == 200


async def test_the_real_webshop_tells_its_page_in_the_originals_order() -> None:
    async with serving(WebShop) as client:
        env = {"env_idx": (await client.post("/create")).json()}

        async def actions() -> Any:
            return (await client.get("/available_actions", params=env)).json()

        assert (await client.get("/available_actions", params=env)).status_code == 409
        text, _ = (await client.post("/reset", json={**env, "session_id": 0})).json()
        assert text.startswith("WebShop [SEP] Instruction: [SEP] ")
        assert await actions() == {"has_search_bar": True, "clickables": ["search"]}
        answer = (await client.post("/step", json={**env, "action": "search[black]"})).json()
        assert (answer["reward"], answer["done"], answer["info"]) == (0.0, False, None)
        results = (await actions())["clickables"]
        assert results[:2] == ["back to search", "next >"]
        shown = [part.lower() for part in answer["state"].split(" [SEP] ")]
        assert [name for name in shown if name in results[2:]] == results[2:]
        await client.post("/step", json={**env, "action": f"click[{results[2]}]"})
        page = await actions()
        assert page["has_search_bar"] is False
        assert page["clickables"][:6] == ["back to search", "< prev", "description", "features", "reviews", "buy now"]
        bought = (await client.post("/step", json={**env, "action": "click[buy now]"})).json()
        assert bought["done"] is True
        assert await actions() == {"has_search_bar": False, "clickables": []}


async def test_tasks_are_counted_through_the_splits() -> None:
    async with serving(Counting) as client:
        number = (await client.post("/create")).json()["id"]

        async def reset(game: int) -> httpx.Response:
            return await client.post("/reset", json={"id": number, "game": game})

        assert (await reset(49)).json()["observation"].endswith("the target is 51.")
        assert (await reset(50)).status_code == 422


@pytest.mark.parametrize(
    ("method", "path", "given", "status"),
    [
        ("GET", "/observation", {"id": 5}, 404),
        ("GET", "/observation", {}, 422),
        ("GET", "/observation", {"id": "x"}, 422),
        ("POST", "/step", {"id": 5, "action": "up"}, 404),
        ("POST", "/step", {"id": -1, "action": "up"}, 422),
        ("POST", "/step", {"id": 2**63, "action": "up"}, 404),
        ("POST", "/step", {"id": 5, "action": "x" * 5000}, 422),
        ("POST", "/reset", {"id": 5, "game": 0, "world_type": "Smell"}, 422),
    ],
)
async def test_mistakes_are_problem_documents(method: str, path: str, given: dict[str, object], status: int) -> None:
    async with serving(Counting) as client:
        sent = {"params": given} if method == "GET" else {"json": given}
        response = await client.request(method, path, **sent)
        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"


async def test_an_environment_that_was_not_reset_has_no_observation() -> None:
    async with serving(Counting) as client:
        number = (await client.post("/create")).json()["id"]
        response = await client.get("/observation", params={"id": number})
        assert (response.status_code, "reset it first" in response.text) == (409, True)


async def test_environments_are_bounded_and_old_ones_make_room() -> None:
    now = 0.0
    table = SessionTable(Counting, max_sessions=2, idle_seconds=10.0, clock=lambda: now)
    shim = Shim(table, clock=lambda: now)
    first, second = shim.create(), shim.create()
    await shim.reset(first, 0)
    with pytest.raises(Busy, match="all 2 environments"):
        shim.create()
    now = 8.0
    await shim.step(first, "up")
    now = 15.0
    third = shim.create()
    assert len({first, second, third}) == 3
    assert (await shim.step(first, "down")).step == 2
    with pytest.raises(SessionUnknown):
        await shim.reset(second, 0)
    shim.close(first)
    assert table.live == 0
