"""ALFWorld and WebShop behind a client against instances of their own: any order, any number of sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, rule, run_state_machine_as_test

from env_servers.client import EnvironmentClient, HttpClient, RequestRejected, SessionLost
from env_servers.clients.local import LocalClient
from env_servers.environment import Environment, Observation
from env_servers.protocol import FREE_TEXT, ResetRequest, StepResult
from env_servers.registry import ENVIRONMENTS, load_environment
from tests.env_servers.launching import launch

QUICK = [name for name in ENVIRONMENTS if not name.endswith("-textworld")]
MAX_STEPS = 6
TASKS = 3
NONSENSE = st.text(max_size=30) | st.sampled_from(["look", "search[]", "search[<r>]", "click[buy now]", "help"])


@dataclass
class Twin:
    """A session, and an instance of its own that is told the same."""

    session: str
    alone: Environment
    seen: Observation
    steps: int = 0
    last: StepResult | None = field(default=None)

    @property
    def over(self) -> bool:
        return self.seen.terminated or self.steps == MAX_STEPS

    def check(self, result: StepResult) -> None:
        seen = self.seen
        assert (result.session, result.step) == (self.session, self.steps)
        assert (result.observation, result.reward, result.anchor) == (seen.text, seen.reward, seen.state)
        assert (result.terminated, result.truncated) == (seen.terminated, self.over and not seen.terminated)
        assert (result.admissible, result.expert) == (list(seen.admissible or ()), seen.expert)
        assert result.facts == dict(seen.facts)
        self.last = result


class TwinMachine(RuleBasedStateMachine):
    """Every session does what its instance does, whatever the others do."""

    twins = Bundle("twins")

    def __init__(self, connect: Callable[[], EnvironmentClient], environment: type[Environment]) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.environment = environment
        self.opened: list[Twin] = []

        async def open_here() -> EnvironmentClient:
            return connect()

        self.client = self.runner.run(open_here())

    @rule(target=twins, index=st.integers(0, TASKS - 1), expert=st.booleans())
    def reset(self, index: int, expert: bool) -> Twin:
        split = next(iter(self.environment.splits()))
        request = ResetRequest(split=split, index=index, anchor="state", max_steps=MAX_STEPS, expert=expert)
        alone = self.environment()
        result = self.runner.run(self.client.reset(request))
        twin = Twin(result.session, alone, alone.reset(split, index, expert=expert))
        twin.check(result)
        self.opened.append(twin)
        return twin

    @rule(twin=twins, choice=st.integers(0, 10**6), words=st.sampled_from(["black", "", "red [x]", "x" * 200]))
    def step(self, twin: Twin, choice: int, words: str) -> None:
        choices = [*(twin.seen.admissible or ("look",)), *([twin.seen.expert] if twin.seen.expert else [])]
        self._take(twin, choices[choice % len(choices)].replace(FREE_TEXT, words))

    @rule(twin=twins, action=NONSENSE)
    def nonsense(self, twin: Twin, action: str) -> None:
        self._take(twin, action)

    @rule(twin=twins)
    def repeat(self, twin: Twin) -> None:
        if twin.steps:
            assert self.runner.run(self.client.step(twin.session, twin.steps, "something else")) == twin.last

    @rule(twin=consumes(twins))
    def close(self, twin: Twin) -> None:
        self.opened.remove(twin)
        self.runner.run(self.client.close_session(twin.session))
        with pytest.raises(SessionLost):
            self.runner.run(self.client.step(twin.session, twin.steps + 1, "look"))

    def _take(self, twin: Twin, action: str) -> None:
        call = self.client.step(twin.session, twin.steps + 1, action)
        if twin.over:
            with pytest.raises(RequestRejected, match="the episode ended"):
                self.runner.run(call)
            return
        result = self.runner.run(call)
        twin.steps += 1
        twin.seen = twin.alone.step(action)
        twin.check(result)

    def teardown(self) -> None:
        async def close() -> None:
            for twin in self.opened:
                await self.client.close_session(twin.session)
            await self.client.close()

        self.runner.run(close())
        self.runner.close()


def explore(connect: Callable[[], EnvironmentClient], environment: type[Environment], examples: int) -> None:
    run_state_machine_as_test(
        lambda: TwinMachine(connect, environment),
        settings=settings(
            max_examples=examples, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.fixture(params=QUICK)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_in_this_process(name: str) -> None:
    environment = load_environment(name)
    explore(lambda: LocalClient(environment), environment, 25)


def test_over_http(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with launch(tmp_path_factory.mktemp("server") / "ready", name) as server:
        explore(lambda: HttpClient(server.url), load_environment(name), 8)
