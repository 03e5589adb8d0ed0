"""A gateway on loopback with episodes of the counting environment; the policy says what the test tells it."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from actors.engine.interface import Sample
from actors.episode import action_form
from actors.gateway.app import Gateway
from actors.gateway.calls import Policy
from actors.gateway.conversation import Conversation
from actors.gateway.listening import Listening
from actors.gateway.metrics import GatewayMetrics
from actors.gateway.read import AnswerReader
from actors.gateway.render import Renderer
from actors.gateway.session import Bound, Own, Session
from env_servers.client import EnvironmentClient
from env_servers.clients.local import LocalClient
from env_servers.protocol import ResetRequest
from services.config.agent import AgentConfig
from services.config.tree import Config
from services.schemas import Task, Ticket, VersionSpan
from tests.actors.gateway.families import MODEL, stop, tokenizer, written
from tests.env_servers.counting import Counting

TOKEN = "a-token-of-the-run-for-services"
ACT = {
    "type": "function",
    "function": {
        "name": "act",
        "parameters": {"type": "object", "properties": {"action": {"type": "string"}}, "required": ["action"]},
    },
}


def act(action: str) -> str:
    """What the policy writes to act."""
    return written("chatml", "", "", [("act", {"action": action})])


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@dataclass
class Telling:
    """A sampler that says what it is told, else `say` of the number of the call.

    Attributes:
        prompts: ids of every prompt, in order. answers: ids of every answer. settings: of every call.
        open: while it is cleared, nobody is answered.
    """

    say: Callable[[int], str] = lambda number: act("up")
    told: deque[str] = field(default_factory=deque)
    prompts: list[list[int]] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    version: int = 3
    error: Exception | None = None
    dropped: int = 0

    def __post_init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self._tokenizer = tokenizer("chatml")

    async def generate(
        self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int, stop: Sequence[str] = ()
    ) -> Sample:
        number = len(self.prompts)
        self.prompts.append([*prompt_ids])
        self.settings.append({"temperature": temperature, "max_tokens": max_tokens, "seed": seed, "stop": [*stop]})
        text = self.told.popleft() if self.told else self.say(number)
        self.answers.append([])
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.dropped += 1
            raise
        if self.error is not None:
            raise self.error
        return self._sample(number, text, max_tokens, stop)

    def _sample(self, number: int, text: str, max_tokens: int, stops: Sequence[str]) -> Sample:
        found = min((text.index(one) for one in stops if one in text), default=None)
        by = next((one for one in stops if found is not None and text.startswith(one, found)), None)
        if by is not None and found is not None:
            text = text[: found + len(by)]
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        end = [] if by is not None else [self._tokenizer.convert_tokens_to_ids(stop("chatml", False))]
        whole = [*ids, *end]
        kept = whole[:max_tokens]
        self.answers[number] = kept
        spans = (VersionSpan(self.version, len(kept)),)
        return Sample(kept, [-0.5] * len(kept), spans, text, len(kept) == len(whole), by)


@dataclass
class Scene:
    """One gateway, and what its episodes need."""

    config: Config
    agent: AgentConfig
    sampler: Telling
    gateway: Gateway
    renderer: Renderer
    client: EnvironmentClient
    url: str
    keys: dict[int, str] = field(default_factory=dict)

    async def bound(self, member: int = 0, *, index: int = 3) -> tuple[Session, httpx.AsyncClient]:
        """An episode in which one has to count to `index + 2`, and a client with its key."""
        ticket = ticket_of(member, index)
        form = await action_form(self.client, self.config, "counting")
        first = await self.client.reset(ResetRequest(split="train", index=index, max_steps=self.config.env.max_steps))
        conversation = Conversation(self.renderer)
        return self._with_key(
            Bound(ticket, self.config, self.agent, conversation, client=self.client, first=first, form=form)
        )

    def own(self, member: int = 0) -> tuple[Session, httpx.AsyncClient]:
        """An episode in the agent's own world, and a client with its key."""
        return self._with_key(Own(ticket_of(member), self.config, self.agent, Conversation(self.renderer)))

    def _with_key(self, session: Session) -> tuple[Session, httpx.AsyncClient]:
        key = self.gateway.keys.issue(session)
        self.keys[id(session)] = key
        return session, self.http(key)

    def key(self, session: Session) -> str:
        return self.keys[id(session)]

    def http(self, key: str, **headers: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url, headers={"Authorization": f"Bearer {key}", **headers}, timeout=60, trust_env=False
        )


def ticket_of(member: int = 0, index: int = 3) -> Ticket:
    task = Task(env="counting", split="train", index=index)
    return Ticket(group=17, member=member, group_size=4, task=task, seed=1000 + member, temperature=0.7)


@dataclass(frozen=True)
class Settings:
    """The configuration of a run, and of its agents."""

    config: Config
    agent: AgentConfig


def agent_config(tmp_path: Path, **agent: Any) -> Settings:
    config = Config.model_validate(
        {
            "run": {"name": "agents", "dir": tmp_path},
            "model": {"path": MODEL, "max_prompt_tokens": 2000, "max_response_tokens": 256},
            "env": {"name": "counting", "max_steps": 12, "success_reward": 10.0},
            "rollout": {"episodes_in_flight": 6, "lease_s": 60.0, "max_attempts": 2},
            "weights": {"channel": "directory"},
        }
    )
    kind = {} if "command" in agent else {"service": True}
    return Settings(config, AgentConfig.model_validate({**kind, **agent}))


@asynccontextmanager
async def gateway(settings: Settings, sampler: Telling | None = None) -> AsyncIterator[Scene]:
    """A gateway that listens."""
    sampler = sampler or Telling()
    renderer = Renderer(tokenizer("chatml"), history="sampled")
    policy = Policy(renderer, AnswerReader(renderer), sampler, GatewayMetrics())
    made = Gateway(policy, TOKEN)
    listening = Listening(made.app, "127.0.0.1:0")
    client = LocalClient(Counting)
    await listening.start()
    try:
        yield Scene(settings.config, settings.agent, sampler, made, renderer, client, listening.url)
    finally:
        await listening.stop()
        await client.close()


def arguments_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The arguments of the tool calls in a chat completion."""
    calls = response.json()["choices"][0]["message"].get("tool_calls", [])
    return [json.loads(call["function"]["arguments"]) for call in calls]
