"""What the gateway for agent programs costs: processor time and delay of a call, tokens per second beside the engine.

The agents are in a process of their own (`agent_clients`), the gateway in this one, as in an actor.

`overhead`: the engine is a timer that answers each call after `ANSWER_S`. 128 conversations of 20 messages with tools
continue all the time, out of step. The processor time is this process's; what a call took beyond the timer is added
delay.

`throughput`: a real engine with the starter policy. The calls of each episode are then asked of the same engine
directly, in the same order, with the same seeds and lengths, as many episodes at the same time. Both take turns for
several rounds, after a warm-up; before each, the prefix cache is emptied by loading the same weights.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from actors.engine.interface import Sample, Sampler
from actors.engine.process import EngineProcess
from actors.gateway.app import Gateway
from actors.gateway.calls import Policy, call_seed, prompt_digest
from actors.gateway.conversation import Conversation
from actors.gateway.listening import Listening
from actors.gateway.metrics import GatewayMetrics
from actors.gateway.read import AnswerReader
from actors.gateway.render import Renderer
from actors.gateway.session import Own
from actors.rollout_process import freeze_heap
from benchmarks.conversation import MESSAGES, chat_tokenizer, tools
from benchmarks.parts.agent_clients import Job
from services.config.agent import AgentConfig
from services.config.tree import Config
from services.model_folder import read_weights
from services.schemas import Task, Ticket, VersionSpan

IN_FLIGHT = 128
ANSWER_S = 1.0
"""About as long as the starter policy takes for an answer with as many calls in flight."""
SAID = '<tool_call>{"name": "act", "arguments": {"action": "open drawer 1"}}</tool_call>'
WARM_CALLS = MESSAGES // 2
"""So many calls make a conversation of `MESSAGES` messages."""
CALLS = 4
"""Of an episode of `throughput`."""
ANSWER_TOKENS = 24


class Timer:
    """A sampler that says `SAID` after `seconds`."""

    def __init__(self, tokenizer: Any) -> None:
        self.seconds = 0.0
        self._ids = [*tokenizer.encode(SAID, add_special_tokens=False), tokenizer.eos_token_id]

    async def generate(
        self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int, stop: Sequence[str] = ()
    ) -> Sample:
        await asyncio.sleep(self.seconds)
        ids = self._ids
        return Sample([*ids], [-0.5] * len(ids), (VersionSpan(0, len(ids)),), SAID, finished=True)


class Service:
    """A gateway and the episodes that it serves."""

    def __init__(self, config: Config, renderer: Renderer, sampler: Sampler) -> None:
        self._config = config
        self._agent = AgentConfig(service=True, environment="own")
        self._renderer = renderer
        self._gateway = Gateway(Policy(renderer, AnswerReader(renderer), sampler, GatewayMetrics()))
        self.listening = Listening(self._gateway.app, "127.0.0.1:0")
        self.sessions: list[Own] = []
        self._tickets = 0

    def keys(self, count: int) -> list[str]:
        """Keys of new episodes, in place of the former ones."""
        self.sessions = [self._session() for _ in range(count)]
        return [self._gateway.keys.issue(session) for session in self.sessions]

    def _session(self) -> Own:
        self._tickets += 1
        task = Task(env=self._config.env.name, split="train", index=0)
        ticket = Ticket(group=self._tickets, member=0, group_size=1, task=task, seed=self._tickets)
        return Own(ticket, self._config, self._agent, Conversation(self._renderer))


@asynccontextmanager
async def serving(config: Config, renderer: Renderer, sampler: Sampler) -> AsyncIterator[Service]:
    service = Service(config, renderer, sampler)
    await service.listening.start()
    try:
        yield service
    finally:
        await service.listening.stop()


class Clients:
    """The agents' process; `phase` lets them make their next calls."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ready(self) -> None:
        """Wait until they have imported what they need. RuntimeError if they ended instead."""
        await self._line()

    async def phase(self) -> list[float]:
        """Seconds of each call of the next phase. RuntimeError if they ended instead."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        times: list[float] = json.loads(await self._line())
        return times

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the agents ended with exit code {await self._process.wait()}")
        return line


@asynccontextmanager
async def clients(job: Job) -> AsyncIterator[Clients]:
    command = [sys.executable, "-m", "benchmarks.parts.agent_clients"]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=2**26)
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
    try:
        agents = Clients(process)
        await agents.ready()
        yield agents
        process.stdin.close()
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def agent_config(folder: Path, model: Path) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "agents", "dir": folder},
            "model": {"path": model, "max_prompt_tokens": 1200, "max_response_tokens": 64},
            "rollout": {"episodes_in_flight": IN_FLIGHT, "kv_cache_mib": 512},
        }
    )


async def overhead(config: Config, calls: int) -> dict[str, float]:
    """The figures of `calls` calls of each of `IN_FLIGHT` conversations, with a timer as the engine."""
    tokenizer = chat_tokenizer()
    timer, wide = Timer(tokenizer), config.model.model_copy(update={"max_prompt_tokens": 10_000})
    config = config.model_copy(update={"model": wide})
    async with serving(config, Renderer(tokenizer), timer) as service:
        declared: Any = tools()
        job = Job(
            url=service.listening.url,
            kind="raw",
            keys=service.keys(IN_FLIGHT),
            in_flight=IN_FLIGHT,
            phases=[WARM_CALLS, calls],
            longest=MESSAGES,
            tools=declared,
            max_tokens=64,
            stagger_s=ANSWER_S,
        )
        async with clients(job) as agents:
            await agents.phase()
            freeze_heap()  # as an actor does before it plays
            timer.seconds = ANSWER_S
            spent, extended = time.process_time(), _extended(service)
            times = await agents.phase()
            spent = time.process_time() - spent
        made = IN_FLIGHT * calls
        return {
            "calls": made,
            "extended_share": (_extended(service) - extended) / made,
            "cpu_ms_per_call": 1000 * spent / made,
            "added_ms_median": 1000 * (median(times) - ANSWER_S),
            "added_ms_p99": 1000 * (quantiles(times, n=100)[98] - ANSWER_S),
        }


def _extended(service: Service) -> int:
    return sum(session.counts["extended"] for session in service.sessions)


def write_chat_starter(folder: Path) -> Path:
    """The starter policy with rows for the markers of the chat template, and that template."""
    from transformers import AutoModelForCausalLM

    from benchmarks.conversation import MODEL

    tokenizer = chat_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


async def throughput(config: Config, episodes: int, rounds: int) -> dict[str, float]:
    """Tokens per second through the gateway over those of the engine alone: medians over rounds."""
    engine = EngineProcess(config.model, config.rollout, config.run.seed)
    await engine.start()
    weights = read_weights(config.model.path)
    found: dict[str, list[float]] = {"raw": [], "openai": []}
    speeds: dict[str, list[float]] = {"raw": [], "openai": [], "direct": []}
    try:
        async with serving(config, Renderer(chat_tokenizer()), engine) as service:
            for number in range(rounds + 1):
                for kind in found:
                    await engine.load_weights(0, weights)
                    agents = await _through(service, kind, episodes)
                    await engine.load_weights(0, weights)
                    direct = await _direct(engine, service.sessions)
                    if number:
                        found[kind].append(agents / direct)
                        speeds[kind].append(agents)
                        speeds["direct"].append(direct)
    finally:
        await engine.stop()
    return {
        "rounds": rounds,
        **{f"{kind}_tokens_per_s": median(values) for kind, values in speeds.items()},
        **{f"{kind}_over_direct": median(values) for kind, values in found.items()},
    }


async def _through(service: Service, kind: str, episodes: int) -> float:
    """Tokens per second of agents that play so many episodes."""
    job = Job(
        url=service.listening.url,
        kind=kind,
        keys=service.keys(episodes),
        in_flight=IN_FLIGHT,
        phases=[CALLS],
        longest=1000,
        tools=[],
        max_tokens=ANSWER_TOKENS,
    )
    async with clients(job) as agents:
        began = time.perf_counter()
        await agents.phase()
        seconds = time.perf_counter() - began
    sampled = [call.sample for session in service.sessions for call in session.record.calls]
    return sum(len(sample.token_ids) for sample in sampled if sample is not None) / seconds


async def _direct(engine: EngineProcess, sessions: Sequence[Own]) -> float:
    """Tokens per second of the same calls, asked of the engine."""
    waiting, sampled = iter(sessions), 0

    async def work() -> None:
        nonlocal sampled
        for session in waiting:
            for call in session.record.calls:
                assert call.sample is not None
                sample = await engine.generate(
                    call.prompt.ids.tolist(),
                    temperature=session.ticket.temperature,
                    max_tokens=len(call.sample.token_ids),
                    seed=call_seed(session.ticket.seed, prompt_digest(call.prompt), 1),
                )
                sampled += len(sample.token_ids)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    return sampled / (time.perf_counter() - began)


def measure(folder: Path, short: bool) -> dict[str, float]:
    """The figures of both, by name."""
    config = agent_config(folder, write_chat_starter(folder / "chat-starter"))
    found = asyncio.run(overhead(config, 4 if short else 20))
    return found | asyncio.run(throughput(config, IN_FLIGHT * (1 if short else 4), 1 if short else 3))
