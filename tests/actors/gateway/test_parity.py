"""What is stored of an agent's calls against the learner's function: the log-probabilities of a real engine.

The agent asks for another sampling than the run's, with tools and stop strings. The policy is random, so a reader of
the test's own takes each answer for a tool call: what follows one is spliced.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import AutoTokenizer

from actors.engine.process import EngineProcess
from actors.gateway.app import Gateway
from actors.gateway.calls import Policy as Calling
from actors.gateway.conversation import Conversation
from actors.gateway.listening import Listening
from actors.gateway.messages import Message, Tool, ToolCall
from actors.gateway.metrics import GatewayMetrics
from actors.gateway.read import AnswerReader
from actors.gateway.render import Renderer
from actors.gateway.session import Own
from learner.batching import Row, plan
from learner.rank.policy import Policy, inputs, load_policy
from services.codec import decode, encode
from services.config.agent import AgentConfig
from services.config.tree import Config, ModelConfig, RolloutConfig
from services.model_folder import read_weights
from services.schemas import Step, Task, Ticket, Trajectory
from tests.actors.gateway.scene import ACT
from tests.integration.test_agents import write_policy

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT = 1e-4
SHORT, LONG = 8, 96
STOPS = ["e", "a", "o", "st"]
CONVERSATIONS, ANSWERS = 6, 3


class CallsAlways:
    """Reads every answer as a call of `act`."""

    def __init__(self, tokenizer: Any) -> None:
        """Nothing is needed of the tokenizer."""

    def read(self, text: str, begun: str, tools: Sequence[Tool]) -> Message:
        return Message("assistant", tool_calls=(ToolCall("act", json.dumps({"action": text})),))


@dataclass
class Real:
    """A gateway in front of a real engine. `folders`: of policy versions 0 and 1."""

    engine: EngineProcess
    gateway: Gateway
    renderer: Renderer
    url: str
    folders: list[Path]

    def session(self, number: int, temperature: float) -> Own:
        """An episode in the agent's own world."""
        model = {"path": self.folders[0], "max_prompt_tokens": 900, "max_response_tokens": LONG}
        config = Config.model_validate({"model": model})
        task = Task(env=config.env.name, split="train", index=0)
        ticket = Ticket(group=0, member=number, group_size=99, task=task, seed=number, temperature=temperature)
        agent = AgentConfig(service=True, environment="own")
        return Own(ticket, config, agent, Conversation(self.renderer))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Real]:
    folder = tmp_path_factory.mktemp("policies")
    folders = [write_policy(folder / str(seed), seed) for seed in (1, 2)]
    engine = EngineProcess(
        ModelConfig(path=folders[0], max_prompt_tokens=900, max_response_tokens=LONG),
        RolloutConfig(episodes_in_flight=16, kv_cache_mib=64),
    )
    renderer = Renderer(AutoTokenizer.from_pretrained(folders[0]), history="sampled")
    reader = AnswerReader(renderer, f"{__name__}:CallsAlways")
    gateway = Gateway(Calling(renderer, reader, engine, GatewayMetrics()))
    listening = Listening(gateway.app, "127.0.0.1:0")
    await asyncio.gather(engine.start(), listening.start())
    yield Real(engine, gateway, renderer, listening.url, folders)
    await listening.stop()
    await engine.stop()


async def played(real: Real, number: int, temperature: float, *, tokens: int = LONG, **body: Any) -> Trajectory:
    """An episode of `ANSWERS` calls, each of which follows the tool call before."""
    session = real.session(number, temperature)
    key = {"Authorization": f"Bearer {real.gateway.keys.issue(session)}"}
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"Task {number}."}]
    body |= {"model": "policy", "tools": [ACT], "temperature": 0, "top_p": 0.5, "max_tokens": tokens}
    async with httpx.AsyncClient(base_url=real.url, headers=key, timeout=300, trust_env=False) as http:
        for turn in range(ANSWERS):
            response = await http.post("/v1/chat/completions", json={**body, "messages": messages})
            assert response.headers["x-anchorage-imposed"] == "temperature,top_p", response.text
            answer = response.json()["choices"][0]["message"]
            [call] = answer["tool_calls"]
            messages += [answer, {"role": "tool", "tool_call_id": call["id"], "content": f"Nothing, {turn}."}]
    session.finish("exit")
    stored = decode(encode(session.trajectory("actor", {})))
    assert [step.extends for step in stored.steps] == [*range(-1, ANSWERS - 1)]
    return stored


def row(step: Step) -> Row:
    return Row(np.concatenate([step.prompt_ids, step.response_ids]), step.logprobs, 0.0)


def gaps(policy: Policy, rows: Sequence[Row]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """|learner's − stored| of all response tokens, in the order of the one batch that the rows make."""
    ((batch,),) = plan(list(rows), 1, 10**6)
    with torch.no_grad():
        logprobs, _ = policy(*inputs(batch, torch.device("cpu")))
    found: np.ndarray[Any, np.dtype[np.float32]] = np.abs(logprobs.numpy() - np.asarray(batch.behaviour))
    return found


@pytest.mark.parametrize("temperature", [0.7, 1.0])
async def test_log_probabilities_are_the_learners_at_the_runs_temperature(real: Real, temperature: float) -> None:
    episodes = await asyncio.gather(
        *(played(real, number, temperature, stop=STOPS) for number in range(CONVERSATIONS)),
        *(played(real, number, temperature) for number in range(CONVERSATIONS, CONVERSATIONS + 2)),
    )
    steps = [step for episode in episodes for step in episode.steps]
    assert sum(step.finished and step.response.endswith(tuple(STOPS)) for step in steps) > 2
    rows = [row(step) for step in steps]
    assert gaps(load_policy(real.folders[0], "float32", temperature), rows).max() < LIMIT
    # As if what the agent asked for had been used, or the log-probabilities were those before the temperature.
    assert gaps(load_policy(real.folders[0], "float32", 2 * temperature), rows).max() > 0.01


async def test_each_span_is_of_its_own_version_across_an_update_within_a_call(real: Real) -> None:
    before = real.engine.stats().responses
    running = asyncio.gather(*(played(real, n, 0.7, tokens=LONG if n else SHORT) for n in range(CONVERSATIONS)))
    while real.engine.stats().responses == before:  # noqa: ASYNC110 - the engine tells no one
        await asyncio.sleep(0)
    await real.engine.load_weights(1, read_weights(real.folders[1]))  # the long ones are on their way
    steps = [step for episode in await running for step in episode.steps]
    policies = dict(enumerate(load_policy(folder, "float32", 0.7) for folder in real.folders))
    assert any(len(step.versions) > 1 for step in steps)
    for step in steps:
        of_version = np.repeat([span.version for span in step.versions], [span.tokens for span in step.versions])
        assert worst(policies, step, of_version) < LIMIT
        assert worst(policies, step, 1 - of_version) > 0.01


def worst(policies: Mapping[int, Policy], step: Step, of_version: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """The largest gap of a step whose tokens come from these versions."""
    each = np.stack([gaps(policies[version], [row(step)]) for version in (0, 1)])
    return float(each[of_version, np.arange(len(of_version))].max())
