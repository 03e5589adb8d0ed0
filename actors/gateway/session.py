"""One attempt at an episode, as its agent sees it: where calls belong, what became of actions, when it is over.

`Bound`: the environment is a session of the environment server; the agent acts through the gateway. `Own`: the agent
has a world of its own, and says what became of it.

Invariants
- Nothing of an attempt is stored before it has ended; `ended` is set once, and its cause never changes.
- After the end nothing is recorded, but the answers of calls that had arrived before.
- A state's number grows with every transition. Calls with the same number are one turn (`record.py`).
- A step that names its number can be repeated, as in the step API.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, Protocol, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actors.engine.interface import Sample
from actors.episode import EpisodeFailed, is_won, scaled_reward
from actors.gateway.conversation import Conversation, Prompt
from actors.gateway.errors import Refused, episode_ended, session_lost
from actors.gateway.record import Record, Transition, digest_of
from actors.gateway.wire import Request
from actors.parsing import is_admissible, shaped
from env_servers.client import EnvironmentClient, EnvironmentFailed, EnvironmentUnavailableError, RequestRejected
from env_servers.client import SessionLost as SessionLost
from env_servers.protocol import ActionForm, StepNumber, StepResult, invalid_value
from services.config.agent import AgentConfig
from services.config.tree import Config, EnvConfig
from services.schemas import Ticket, Trajectory

LONGEST_REASON = 500
LONGEST_FACTS = 64 * 1024

COUNTED = ("follows", "extended", "unreadable", "refused")

Cause = Literal[
    "done", "gave_up", "exit", "crash", "timeout", "idle", "max_calls", "failed", "lost", "engine", "abandoned"
]
"""Why an attempt ended. `done`: its environment or its agent ended it. `gave_up`: the agent exited before. `exit`: an
own-world agent exited after it had posted a reward."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_BodyT = TypeVar("_BodyT", bound=BaseModel)


class StepBody(_Body):
    """Body of `POST /episode/step`."""

    action: str
    step: StepNumber | None = None


class ObserveBody(_Body):
    """Body of `POST /episode/observe`."""

    observation: str = ""
    anchor: str | None = Field(None, max_length=1024)
    reward: float | None = Field(None, strict=True)
    terminated: bool = Field(False, strict=True)
    truncated: bool = Field(False, strict=True)


class EndBody(_Body):
    """Body of `POST /episode/end`."""

    reward: float | None = Field(None, strict=True)
    facts: dict[str, Any] = Field(default_factory=dict)
    truncated: bool = Field(False, strict=True)


class FailBody(_Body):
    """Body of `POST /episode/fail`."""

    reason: str = ""


class StandIn(Protocol):
    """Answers the calls of one attempt in the engine's place."""

    async def answer(self, prompt: Prompt, sample: Callable[[], Awaitable[Sample]]) -> Sample:
        """The answer to a call.

        Args:
            prompt: of the call.
            sample: lets the engine answer.

        Raises:
            EpisodeFailed: there is none.
        """


class Session(ABC):
    """What bound and own attempts have in common.

    Args:
        ticket: the episode.
        config: of the run.
        agent: of the run's agents.
        conversation: of this attempt.

    Attributes:
        record: calls and transitions so far.
        ended: set at the end.
        cause: why it ended; None before.
        reason: of a failure, in one line.
        error: that ended it, where the player has to raise it.
        running: numbers of the calls that have no answer yet.
        asked: how often each prompt was asked, by digest.
        imposed: fields that were imposed on its requests.
        counts: answers that follow an earlier one of their conversation, those of them whose prompt was `extended` from
            it, answers that were `unreadable`, and `refused` requests.
        too_long: whether a prompt was refused for its length.
        exit_code: of the agent's process, once it has exited.
        stand_in: answers its calls; None: the engine does.
    """

    def __init__(self, ticket: Ticket, config: Config, agent: AgentConfig, conversation: Conversation) -> None:
        self.ticket = ticket
        self.config = config
        self.agent = agent
        self.conversation = conversation
        self.record = Record()
        self.ended = asyncio.Event()
        self.cause: Cause | None = None
        self.reason = ""
        self.error: Exception | None = None
        self.running: set[int] = set()
        self.asked: Counter[bytes] = Counter()
        self.imposed: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.too_long = False
        self.exit_code: int | None = None
        self.stand_in: StandIn | None = None
        self.started_at = time.time()
        self.ends_at = self.started_at + config.rollout.episode_timeout_s
        self._active_at = time.monotonic()

    @property
    def env(self) -> EnvConfig:
        return self.config.environment(self.ticket.task.env)

    @property
    def idle_s(self) -> float:
        """For how long the agent has sent nothing and waited for nothing."""
        return 0.0 if self.running else time.monotonic() - self._active_at

    @property
    def orphaned(self) -> int:
        """Number of answers that nobody received."""
        return sum(1 for call in self.record.calls if call.sample is not None and not call.delivered)

    def touch(self) -> None:
        """Note that the agent has sent or received something."""
        self._active_at = time.monotonic()

    def require_open(self) -> None:
        """Raise Refused if the attempt has ended."""
        if not self.ended.is_set():
            return
        if self.cause == "lost":
            raise session_lost()
        raise episode_ended()

    def finish(self, cause: Cause, reason: str = "", error: Exception | None = None) -> None:
        """End the attempt. The first end wins."""
        if self.cause is None:
            self.cause, self.reason, self.error = cause, reason, error
            self.ended.set()

    def admit(self) -> None:
        """Raise Refused if a further call is not accepted; too many of them end the attempt."""
        self.require_open()
        if len(self.record.calls) >= self.agent.max_calls:
            self.finish("max_calls")
            raise Refused(
                400, "episode_ended", f"the episode has made {self.agent.max_calls} calls (agent.max_calls): it is over"
            )
        if len(self.running) >= self.agent.parallel_calls:
            raise Refused(
                429,
                "too_many_calls",
                f"{self.agent.parallel_calls} calls of this episode are running (agent.parallel_calls): retry later",
            )

    def fail(self, body: FailBody) -> None:
        """Give the attempt up."""
        self.require_open()
        reason = " ".join(body.reason.split())[:LONGEST_REASON]
        self.finish("failed", f"the agent gave up: {reason or 'no reason given'}")

    def describe(self) -> dict[str, Any]:
        """The answer to `GET /episode`."""
        config = self.config
        return {
            "episode": self.ticket.id,
            "task": self.ticket.task.model_dump(),
            "goal": self.goal,
            "state": self.state(),
            "ends_at": int(self.ends_at),
            "limits": {
                "max_steps": min(self.env.max_steps, self.ticket.max_steps or self.env.max_steps),
                "max_calls": self.agent.max_calls,
                "max_prompt_tokens": config.model.max_prompt_tokens,
                "max_response_tokens": config.model.max_response_tokens,
            },
        }

    def trajectory(self, actor: str, facts: Mapping[str, object]) -> Trajectory:
        """The trajectory of the ended attempt.

        Args:
            actor: that played it.
            facts: about the agent's process.
        """
        assert self.cause is not None
        about = {
            "cause": self.cause,
            **({"prompt_too_long": True} if self.too_long else {}),
            "calls": len(self.record.calls),
            "imposed": sorted(self.imposed),
            "orphaned": self.orphaned,
            **{name: self.counts[name] for name in COUNTED},
            **facts,
        }
        steps = self.record.steps(cut=self.cause not in ("done", "exit"))
        everything = {**self.facts(), "agent": about}
        return Trajectory(
            self.ticket, steps, everything, actor, self.started_at, time.time(), final_anchor=self.final_anchor
        )

    @property
    @abstractmethod
    def goal(self) -> str | None: ...

    @property
    def final_anchor(self) -> str | None:
        """Anchor of the state that the last transition led to; None: not known."""
        return None

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The state as the agent gets it."""

    @abstractmethod
    def facts(self) -> dict[str, object]:
        """The facts of the episode so far, `won` among them."""

    @abstractmethod
    def place(self, request: Request) -> tuple[int, str]:
        """Number and anchor of the state in which a call arrives."""

    async def step(self, body: StepBody) -> dict[str, Any]:
        raise _wrong_kind("environment=own: report what happened by POST /episode/observe")

    def observe(self, body: ObserveBody) -> dict[str, Any]:
        raise _wrong_kind("environment=bound: act by POST /episode/step")

    def end(self, body: EndBody) -> None:
        raise _wrong_kind("environment=bound: the environment ends the episode; exit, or POST /episode/fail")

    @abstractmethod
    async def close(self) -> None:
        """Release what the attempt holds elsewhere."""


class Bound(Session):
    """An attempt whose environment is a session of the environment server.

    Args:
        ticket, config, agent, conversation: as for `Session`.
        client: of the environment.
        first: result of the reset.
        form: how the environment wants actions to be normalised.
    """

    def __init__(
        self,
        ticket: Ticket,
        config: Config,
        agent: AgentConfig,
        conversation: Conversation,
        *,
        client: EnvironmentClient,
        first: StepResult,
        form: ActionForm,
    ) -> None:
        super().__init__(ticket, config, agent, conversation)
        self._client = client
        self._state = first
        self._facts: dict[str, object] = dict(first.facts)
        self._form = form
        self._action: str | None = None
        self._stepping = asyncio.Lock()

    @property
    def result(self) -> StepResult:
        """The current state, as the environment reported it."""
        return self._state

    @property
    def goal(self) -> str | None:
        return str(self._facts["goal"]) if self._facts.get("goal") else None

    @property
    def final_anchor(self) -> str | None:
        return self._state.anchor if self.record.transitions else None

    def state(self) -> dict[str, Any]:
        return self._state.model_dump(exclude={"session", "expert"}) | {"done": self._state.done}

    def facts(self) -> dict[str, object]:
        return {**self._facts, "won": is_won(self._facts, self._state, self.env.won_at)}

    def place(self, request: Request) -> tuple[int, str]:
        return self._state.step, self._state.anchor

    async def step(self, body: StepBody) -> dict[str, Any]:
        """Take an action.

        Raises:
            Refused: the episode has ended, the step has another number, or the server rejects the request.
        """
        async with self._stepping:
            # Of concurrent steps the first wins: the others were chosen in a state that is left by now.
            if body.step is not None and body.step == self._state.step and body.action == self._action:
                return self.state()
            self.require_open()
            if body.step is not None and body.step != self._state.step + 1:
                raise Refused(
                    400, "wrong_step", f"the next step is {self._state.step + 1}, got {body.step}", param="step"
                )
            await self._take(body.action)
            return self.state()

    async def _take(self, written: str) -> None:
        before, action = self._state, shaped(written, self._form)
        try:
            after = await self._client.step(before.session, before.step + 1, action)
        except (SessionLost, EnvironmentFailed, EnvironmentUnavailableError) as error:
            self.finish("lost", error=SessionLost(str(error)))
            raise session_lost() from None
        except RequestRejected as error:
            raise Refused(400, "action_rejected", f"the environment rejected the action: {error}") from None
        self._action, self._state = written, after
        self._facts.update(after.facts)
        if self.ended.is_set():  # meanwhile, by a limit
            return
        listed = before.admissible is None or is_admissible(action, before.admissible)
        try:
            reward = scaled_reward(after.reward, self.env)
        except EpisodeFailed as error:
            self.finish("failed", str(error))
            raise episode_ended() from None
        self.record.transitions.append(
            Transition(
                state=before.step,
                action=action,
                reward=reward,
                valid=after.accepted and (listed or self.config.prompt.validity == "well_formed"),
                terminated=after.terminated,
                truncated=after.truncated,
            )
        )
        if after.done:
            self.finish("done")

    async def close(self) -> None:
        await self._client.close_session(self._state.session)


class Own(Session):
    """An attempt in the agent's own world."""

    def __init__(self, ticket: Ticket, config: Config, agent: AgentConfig, conversation: Conversation) -> None:
        super().__init__(ticket, config, agent, conversation)
        self._number = 0
        self._is_used = False
        self._observed: ObserveBody | None = None
        self._last: tuple[float, bool] = (0.0, False)
        self._told: dict[str, object] = {}
        self._end: EndBody | None = None
        self.rewarded = False

    @property
    def goal(self) -> str | None:
        return None

    def state(self) -> dict[str, Any]:
        seen = self._observed
        return {
            "step": len(self.record.transitions),
            "observation": seen.observation if seen else "",
            "anchor": seen.anchor if seen else None,
            "done": self.ended.is_set(),
        }

    def facts(self) -> dict[str, object]:
        reward, terminated = self._last
        ended = terminated or self.cause == "exit"
        last = StepResult(
            session="", step=0, observation="", reward=reward, terminated=ended, truncated=not ended, anchor=""
        )
        return {**self._told, "won": is_won(self._told, last, self.env.won_at)}

    def place(self, request: Request) -> tuple[int, str]:
        if self._observed is None:
            if self._is_used and not self.running:
                self._number += 1
            self._is_used = True
        return self._number, self._anchor(request)

    def _anchor(self, request: Request) -> str:
        if request.anchor:
            return request.anchor
        if self._observed is not None and self._observed.anchor is not None:
            return self._observed.anchor
        if self.agent.anchor == "none":
            return f"{self.ticket.id}#{self._number}"
        if not request.messages:
            return f"{request.prompt}" if isinstance(request.prompt, str) else f"{self.ticket.id}#{self._number}"
        return digest_of(request.messages, request.tools, whole=self.agent.anchor == "history")

    async def close(self) -> None:
        """Nothing is held."""

    def observe(self, body: ObserveBody) -> dict[str, Any]:
        """Record a transition of the agent's world. Raises Refused after the end."""
        self.require_open()
        over = body.terminated or body.truncated
        self.rewarded = self.rewarded or over or body.reward is not None
        self._transition(body.reward or 0.0, terminated=body.terminated, truncated=body.truncated)
        self._number += 1
        self._observed = body
        if over:
            self.finish("done")
        return self.state()

    def end(self, body: EndBody) -> None:
        """End the episode. The same end may be posted again. Raises Refused after another end."""
        if self._end is not None and self._end == body:
            return
        self.require_open()
        problem = invalid_value(body.reward or 0.0, body.facts)
        if problem is None and len(_dumped(body.facts)) > LONGEST_FACTS:
            problem = f"facts are longer than {LONGEST_FACTS} bytes"
        if problem is not None:
            raise Refused(400, "invalid_value", problem)
        if body.reward is None and not self.rewarded:
            raise Refused(400, "invalid_value", "reward is required: none was posted before", param="reward")
        self._transition(body.reward or 0.0, terminated=not body.truncated, truncated=body.truncated)
        self._end = body
        self._told.update(body.facts)
        self.finish("done")

    def _transition(self, reward: float, *, terminated: bool, truncated: bool) -> None:
        try:
            scaled = scaled_reward(reward, self.env)
        except EpisodeFailed as error:
            raise Refused(400, "invalid_value", str(error), param="reward") from None
        self._last = reward, terminated
        self.record.transitions.append(
            Transition(self._number, action="", reward=scaled, terminated=terminated, truncated=truncated)
        )


def parsed(kind: type[_BodyT], tree: Mapping[str, Any]) -> _BodyT:
    """A body of the episode's routes. Raises Refused."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(400, "invalid_value", f"{where}: {first['msg']}", param=where or None) from None


def _dumped(facts: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(facts)
    except orjson.JSONEncodeError as error:
        raise Refused(400, "invalid_value", f"facts: {error}", param="facts") from None


def _wrong_kind(instead: str) -> Refused:
    return Refused(400, "wrong_environment", f"this run has agent.{instead}")
