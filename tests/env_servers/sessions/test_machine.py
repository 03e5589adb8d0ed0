"""Sessions against a model: resets, steps, repeats, mistakes and closes in any order, through every client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from env_servers.client import EnvironmentClient, HttpClient, RequestRejected, SessionLost
from env_servers.clients.local import LocalClient
from env_servers.launch import ServerProcess
from env_servers.protocol import ResetRequest, StepResult
from tests.env_servers.counting import TASKS, Counting
from tests.env_servers.launching import COUNTING, launch

ACTIONS = st.sampled_from(["up", "up", "up", "down", "look"]) | st.text(max_size=20)
PATHS = ["reset", "step", "close", "batch/reset", "batch/step", "mcp", "agentgym/step"]


@dataclass
class Model:
    """What a session should be. `ended`: it was closed, or its environment failed."""

    session: str
    target: int
    max_steps: int | None
    anchor: str
    value: int = 0
    steps: int = 0
    last: StepResult | None = None
    ended: bool = field(default=False)

    @property
    def won(self) -> bool:
        return self.value == self.target

    @property
    def over(self) -> bool:
        return self.won or self.steps == self.max_steps

    def check(self, result: StepResult) -> None:
        text = f"The count is {self.value}, the target is {self.target}."
        assert (result.session, result.step, result.observation) == (self.session, self.steps, text)
        assert (result.terminated, result.truncated) == (self.won, self.over and not self.won)
        assert (result.reward, result.facts) == (1.0 if self.won else 0.0, {"won": self.won})
        assert result.anchor == (text if self.anchor == "observation" else f"{self.value}/{self.target}")
        self.last = result

    def act(self, action: str) -> None:
        self.value += {"up": 1, "down": -1}.get(action, 0)
        self.steps += 1


class SessionMachine(RuleBasedStateMachine):
    """`client` plays; `send`, where there is HTTP, sends anything anywhere."""

    sessions = Bundle("sessions")

    def __init__(self, connect: Callable[[], EnvironmentClient], url: str | None) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.connect = connect
        self.url = url
        self.models: list[Model] = []

    def run(self, call: Any) -> Any:
        return self.runner.run(call)

    @initialize()
    def open(self) -> None:
        async def connect() -> EnvironmentClient:
            return self.connect()

        self.client: EnvironmentClient = self.run(connect())

    @rule(
        target=sessions,
        index=st.integers(0, 4),
        max_steps=st.none() | st.integers(1, 5),
        anchor=st.sampled_from(["observation", "state"]),
        count=st.integers(1, 3),
    )
    def reset(self, index: int, max_steps: int | None, anchor: Any, count: int) -> Any:
        request = ResetRequest(split="train", index=index, max_steps=max_steps, anchor=anchor)

        async def resets() -> list[StepResult]:
            return await asyncio.gather(*(self.client.reset(request) for _ in range(count)))

        opened = []
        for result in self.run(resets()):
            model = Model(result.session, index + 2, max_steps, anchor)
            model.check(result)
            self.models.append(model)
            opened.append(model)
        return multiple(*opened)

    @rule(index=st.integers(TASKS, TASKS + 5), split=st.sampled_from(["train", "nowhere", ""]))
    def reset_to_nothing(self, index: int, split: str) -> None:
        with pytest.raises(RequestRejected, match="no task"):
            self.run(self.client.reset(ResetRequest(split=split, index=index)))

    @rule(model=sessions, action=ACTIONS)
    def step(self, model: Model, action: str) -> None:
        call = self.client.step(model.session, model.steps + 1, action)
        if model.ended:
            with pytest.raises(SessionLost):
                self.run(call)
        elif model.over:
            with pytest.raises(RequestRejected, match="the episode ended"):
                self.run(call)
        else:
            result = self.run(call)
            model.act(action)
            model.check(result)

    @rule(models=st.lists(sessions, min_size=2, max_size=6, unique_by=id), action=st.sampled_from(["up", "down"]))
    def step_together(self, models: list[Model], action: str) -> None:
        playing = [model for model in models if not model.ended and not model.over]

        async def steps() -> list[StepResult]:
            twice = [model for model in playing for _ in range(2)]
            return await asyncio.gather(*(self.client.step(m.session, m.steps + 1, action) for m in twice))

        results = self.run(steps())
        for number, model in enumerate(playing):
            model.act(action)
            assert results[2 * number] == results[2 * number + 1]
            model.check(results[2 * number])

    @rule(model=sessions, action=ACTIONS)
    def repeat(self, model: Model, action: str) -> None:
        if model.steps and not model.ended:
            assert self.run(self.client.step(model.session, model.steps, action)) == model.last

    @rule(model=sessions, away=st.integers(2, 2**40) | st.integers(-5, -1))
    def step_out_of_order(self, model: Model, away: int) -> None:
        if not model.ended and model.steps + away >= 1:
            with pytest.raises(RequestRejected):
                self.run(self.client.step(model.session, model.steps + away, "up"))

    @rule(model=consumes(sessions))
    def close(self, model: Model) -> None:
        self.run(self.client.close_session(model.session))
        model.ended = True
        with pytest.raises(SessionLost):
            self.run(self.client.step(model.session, model.steps + 1, "up"))

    @rule(model=sessions)
    def fail(self, model: Model) -> None:
        if not model.ended and not model.over:
            with pytest.raises(RequestRejected, match="failed at step"):
                self.run(self.client.step(model.session, model.steps + 1, "fail"))
            model.ended = True

    @rule(path=st.sampled_from(PATHS), body=st.binary(max_size=60), kind=st.sampled_from(["application/json", "x/y"]))
    def send_anything(self, path: str, body: bytes, kind: str) -> None:
        if self.url is not None:
            assert self.run(self._send(path, body, kind)) < 500

    async def _send(self, path: str, body: bytes, kind: str) -> int:
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{self.url}/{path}", data=body, headers={"Content-Type": kind}) as response,
        ):
            return response.status

    @invariant()
    def sessions_have_names_of_their_own(self) -> None:
        assert len({model.session for model in self.models}) == len(self.models)

    def teardown(self) -> None:
        async def close() -> None:
            for model in self.models:
                if not model.ended:
                    await self.client.close_session(model.session)
            await self.client.close()

        if hasattr(self, "client"):
            self.run(close())
        self.runner.close()


def explore(connect: Callable[[], EnvironmentClient], url: str | None, examples: int) -> None:
    run_state_machine_as_test(
        lambda: SessionMachine(connect, url),
        settings=settings(
            max_examples=examples, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    with ExitStack() as servers:

        def start(*options: str) -> ServerProcess:
            return servers.enter_context(launch(tmp_path_factory.mktemp("server") / "ready", COUNTING, *options))

        yield start


def test_in_this_process() -> None:
    explore(lambda: LocalClient(Counting), None, 100)


@pytest.mark.parametrize("coalesce", [False, True])
def test_over_http(serve: Callable[..., ServerProcess], coalesce: bool) -> None:
    url = serve().url
    explore(lambda: HttpClient(url, coalesce=coalesce), url, 25)


def test_over_several_processes(serve: Callable[..., ServerProcess]) -> None:
    url = serve("--workers", "2").url
    explore(lambda: HttpClient(url), url, 25)
