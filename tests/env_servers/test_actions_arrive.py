"""What an environment gets is what was sent, byte for byte, whatever the way; what cannot be sent is a transition."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from env_servers.client import EnvironmentClient, HttpClient, SessionLost, open_client
from env_servers.clients.interface import ActionRefused, EnvironmentFailed, RequestRejected
from env_servers.clients.local import LocalClient
from env_servers.environment import Environment, Observation
from env_servers.launch import ServerProcess
from env_servers.protocol import MAX_ACTION_CHARS, Problem, ResetRequest, StepRequest, StepResult
from tests.env_servers.launching import launch

TASK = ResetRequest(split="train", index=0)


class Heard(Environment):
    """Says which bytes it heard. Whatever begins with `Fly` is none of its actions."""

    name = "heard"

    @classmethod
    def splits(cls) -> Mapping[str, int]:
        return {"train": 10}

    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        return Observation("ready", state="0")

    def step(self, action: str) -> Observation:
        return Observation(action.encode().hex(), state="0", accepted=not action.startswith("Fly"))


WRITTEN = [
    "Go North", "  two  spaces\t", "\n", "a\n\n\tb\r\n", 'if a < b: print("</x>")', '{"a": [1, "\\n", "<b>"]}',
    "[]", '"',
    "\0", "\x7f\x1b[0m", "ẞ İ ﬁ é é", "\u2028\u2029\ufeff\uffff", "👩‍👩‍👧", "</action>", "<|im_end|>", "",
    "x" * MAX_ACTION_CHARS, "\U0001f600" * MAX_ACTION_CHARS, '{"session": "x", "step": 1, "action": "y"}',
]  # fmt: skip


def drawn(count: int) -> list[str]:
    """Texts of any characters but halves of surrogate pairs."""
    rng = random.Random(5)
    letters = [*range(0, 0xD800), *range(0xE000, 0x11000), 0x1F600]
    return ["".join(map(chr, rng.choices(letters, k=rng.randrange(40)))) for _ in range(count)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    ready = tmp_path_factory.mktemp("server") / "ready"
    with launch(ready, f"{__name__}:Heard", "--workers", "2") as process:
        yield process


@pytest.fixture(params=["alone", "together", "openenv", "here"])
async def client(request: pytest.FixtureRequest, server: ServerProcess) -> AsyncIterator[EnvironmentClient]:
    client: EnvironmentClient
    match request.param:
        case "here":
            client = LocalClient(Heard)
        case "openenv":
            client = open_client(f"openenv+{server.url}")
        case how:
            client = HttpClient(server.url, coalesce=how == "together")
    yield client
    await client.close()


async def test_actions_arrive_as_written(client: EnvironmentClient) -> None:
    async def play(actions: list[str]) -> None:
        session = (await client.reset(TASK)).session
        for step, action in enumerate(actions, 1):
            seen = await client.step(session, step, action)
            assert bytes.fromhex(seen.observation).decode() == action
            assert seen.accepted == (not action.startswith("Fly"))
        await client.close_session(session)

    texts = [*WRITTEN, *drawn(300)]
    await asyncio.gather(*(play(texts[start::8]) for start in range(8)))


async def test_what_cannot_be_sent_is_a_transition(client: EnvironmentClient) -> None:
    session = (await client.reset(TASK.model_copy(update={"max_steps": 5}))).session
    for step, action in ((1, "x" * (MAX_ACTION_CHARS + 1)), (2, "half \ud800")):
        refused = await client.step(session, step, action)
        assert refused.observation.startswith("The action was not accepted: ")
        assert (refused.step, refused.reward, refused.done, refused.accepted) == (step, 0.0, False, False)
        assert refused.anchor == refused.observation
        assert await client.step(session, step, action) == refused
    taken = await client.step(session, 3, "on")
    assert (taken.step, taken.observation, taken.accepted) == (3, b"on".hex(), True)
    assert await client.step(session, 3, "on") == taken
    assert not (await client.step(session, 4, "Fly")).accepted
    last = await client.step(session, 5, "on")
    assert (last.step, last.truncated, last.terminated) == (5, True, False)
    with pytest.raises(RequestRejected, match="ended with step 5"):
        await client.step(session, 6, "on")
    await client.close_session(session)
    with pytest.raises(SessionLost):
        await client.step(session, 6, "on")


async def test_a_refused_action_leaves_the_others_of_its_batch_alone(server: ServerProcess) -> None:
    client = HttpClient(server.url, coalesce=True)
    sessions = [(await client.reset(TASK)).session for _ in range(12)]
    actions = ["x" * (MAX_ACTION_CHARS + 1) if number == 5 else f"a{number}" for number in range(12)]
    seen = await asyncio.gather(*(client.step(s, 1, a) for s, a in zip(sessions, actions, strict=True)))
    assert [result.accepted for result in seen] == [number != 5 for number in range(12)]
    await client.close()


async def test_a_refusal_at_the_step_limit_ends_the_episode(server: ServerProcess) -> None:
    client = HttpClient(server.url, coalesce=False)
    first = await client.reset(TASK.model_copy(update={"max_steps": 1, "anchor": "state"}))
    refused = await client.step(first.session, 1, "\ud800")
    assert (refused.truncated, refused.anchor) == (True, "0")
    with pytest.raises(RequestRejected, match="ended with step 1"):
        await client.step(first.session, 2, "on")
    with pytest.raises(ActionRefused):
        await client.step("opened by somebody else", 1, "\ud800")
    await client.close()


async def test_the_server_tells_its_limit_and_form(server: ServerProcess) -> None:
    client = HttpClient(server.url)
    info = await client.info()
    assert (info.action_form, info.max_action_chars) == ("as_written", MAX_ACTION_CHARS)
    await client.close()


class Strict:
    """A foreign step API that answers some actions with a status, once its session is open."""

    def __init__(self) -> None:
        self.steps = 0

    async def reset(self, _: web.Request) -> web.Response:
        return web.json_response(self._state())

    async def step(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["action"].isdecimal():
            return web.Response(status=int(body["action"]), text="no such move")
        assert body["step"] == self.steps + 1
        self.steps += 1
        return web.json_response(self._state())

    async def batch(self, request: web.Request) -> web.Response:
        """Fails as a whole where one of its steps does."""
        bodies = (await request.json())["items"]
        if any(body["action"] == "500" for body in bodies):
            return web.Response(status=500, text="Traceback")
        return web.json_response({"items": [self._state() | {"step": body["step"]} for body in bodies]})

    def _state(self) -> dict[str, object]:
        state = {"session": "s", "step": self.steps, "observation": f"at {self.steps}", "reward": 0, "anchor": "x"}
        return {**state, "terminated": False, "truncated": False}


@asynccontextmanager
async def foreign() -> AsyncIterator[str]:
    server = Strict()
    app = web.Application()
    app.add_routes([web.post("/reset", server.reset), web.post("/step", server.step)])
    app.add_routes([web.post("/batch/step", server.batch)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
    await runner.cleanup()


async def test_a_foreign_servers_word_for_a_bad_action(tmp_path: Path) -> None:
    async with foreign() as url:
        client = HttpClient(url, coalesce=False, patience_s=0.1)
        session = (await client.reset(TASK)).session
        seen: list[StepResult] = []
        for action in ("400", "go", "422", "413", "go"):
            seen.append(await client.step(session, len(seen) + 1, action))
        assert [result.accepted for result in seen] == [False, True, False, False, True]
        assert seen[0].observation == "The action was not accepted: no such move"
        assert [result.step for result in seen] == [1, 2, 3, 4, 5]
        assert seen[4].observation == "at 2"
        for action in ("409", "500"):
            with pytest.raises(RequestRejected) as caught:
                await client.step(session, 6, action)
            assert not isinstance(caught.value, ActionRefused)
        with pytest.raises(SessionLost):
            await client.step(session, 6, "410")
        await client.close()


async def test_an_action_at_which_a_foreign_server_fails_leaves_the_others_of_its_batch_alone() -> None:
    async with foreign() as url:
        client = HttpClient(url, coalesce=True, patience_s=0.1)
        seen = await client.step_many([StepRequest(session="s", step=1, action=action) for action in ("500", "go")])
        assert isinstance(seen[0], Problem)
        assert seen[0].status == 500
        assert isinstance(seen[1], StepResult)
        with pytest.raises(EnvironmentFailed):
            await client.step("s", 2, "500")
        await client.close()
