"""Tokens per second of a rollout actor that plays ALFWorld, and of bare vLLM on the same prompts and lengths.

The actor plays over HTTP with a server process and through Redis, as in a run. Its requests to the engine are recorded
and replayed on a bare engine in this process: stepped in a loop, with as many requests in flight, the prompts in their
original order, responses of the same lengths with their texts as `LLM.generate` returns them, and an empty prefix cache
at the start. The recording ends when the last ticket is leased: after that fewer and fewer episodes are in flight,
which is due to the end of the run and not to the actor. Both take turns for several rounds, after one warm-up round: on
a CPU kernels are compiled when they are first used.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from actors.engine.interface import EngineStats, Sample
from actors.engine.process import EngineProcess
from actors.engine.vllm import VllmCore
from actors.players import TemplatePlayer
from actors.prompts import load_tokenizer, make_prompts
from actors.rollout_actor import Rollout
from env_servers.client import HttpClient
from env_servers.launch import start_server
from learner.dispatch import Dispatcher
from services.buffer import Buffer
from services.config.tree import Config
from services.redis_server import EmbeddedRedis
from services.schemas import TRAIN_STREAM
from services.weights import open_channel

Asked = tuple[list[int], int]
"""A request: prompt ids and the number of sampled tokens."""


class Recorder(EngineProcess):
    """Engine that records its requests and responses until `seal`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._recorded: dict[int, Asked] = {}
        self._numbers = itertools.count()
        self._began = self._ended = 0.0
        self._before = self._counted = EngineStats()

    @property
    def asked(self) -> list[Asked]:
        """The requests that were completed, in the order in which they arrived."""
        return [self._recorded[number] for number in sorted(self._recorded)]

    @property
    def seconds(self) -> float:
        return self._ended - self._began

    @property
    def cached_share(self) -> float:
        """Share of the prompt tokens that the prefix cache held."""
        cached = self._counted.cached_tokens - self._before.cached_tokens
        return cached / (self._counted.prompt_tokens - self._before.prompt_tokens)

    def restart(self) -> None:
        """Discard the recording."""
        self._recorded.clear()
        self._began = self._ended = 0.0
        self._before = self.stats()

    def seal(self) -> None:
        """End the recording: later responses do not count."""
        if not self._ended:
            self._ended, self._counted = time.perf_counter(), self.stats()

    async def generate(
        self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int, stop: Sequence[str] = ()
    ) -> Sample:
        self._began = self._began or time.perf_counter()
        number, prompt = next(self._numbers), list(prompt_ids)
        sample = await super().generate(prompt, temperature=temperature, max_tokens=max_tokens, seed=seed, stop=stop)
        if not self._ended:
            self._recorded[number] = (prompt, len(sample.token_ids))
        return sample

    async def stop(self) -> None:
        """Do nothing: the engine outlives its actors. See `end`."""

    async def end(self) -> None:
        await super().stop()


class Bare:
    """vLLM alone, in this process."""

    def __init__(self, config: Config) -> None:
        self._concurrency = config.rollout.episodes_in_flight
        self._core = VllmCore(config.model, config.rollout, config.run.seed)
        self._core.start()

    def ask(self, asked: Sequence[Asked]) -> tuple[float, float]:
        """Replay requests; return the seconds, and the share of prompt tokens that the prefix cache held."""
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        engine, waiting = self._core.engine, deque(enumerate(asked))
        engine.reset_prefix_cache()
        began, running, cached = time.perf_counter(), 0, 0
        while waiting or running:
            while waiting and running < self._concurrency:
                number, (prompt, length) = waiting.popleft()
                params = SamplingParams(
                    temperature=1.0,
                    seed=number,
                    max_tokens=length,
                    ignore_eos=True,
                    logprobs=0,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                engine.add_request(f"bare-{number}", tokens_input(prompt), params)
                running += 1
            ended = [output for output in engine.step() if output.finished]
            running -= len(ended)
            cached += sum(output.num_cached_tokens or 0 for output in ended)
        return time.perf_counter() - began, cached / sum(len(prompt) for prompt, _ in asked)

    def end(self) -> None:
        """Release the model."""
        self._core.stop()


async def play(config: Config, engine: Recorder, groups: int) -> None:
    """Let the actor play `groups` groups, then drain it."""
    folder = config.run.folder
    ready = folder / "server.url"
    command = [sys.executable, "-m", "env_servers", config.env.name, "--port", "0", "--ready-file", str(ready)]
    with (
        tempfile.TemporaryDirectory() as data,
        EmbeddedRedis(Path(data)) as redis,
        start_server(command, ready) as server,
    ):
        buffer = Buffer.connect(redis.url, config.run.name, config.buffer)
        client = HttpClient(server.url, connections=config.rollout.episodes_in_flight)
        splits = (await client.info()).splits
        channel = open_channel(config.weights, config.run.name, folder)
        channel.publish(0, _weights(config))
        dispatcher = Dispatcher(config, splits)
        buffer.issue(dispatcher.tickets(range(groups)))
        prompts = make_prompts(config.prompt, load_tokenizer(config.model.path), config.model.max_prompt_tokens)
        clients = {config.env.name: client}
        rollout = Rollout(
            "actor",
            config,
            engine=engine,
            environments=clients,
            player=lambda sampler: TemplatePlayer("actor", config, clients, sampler, prompts),
            buffer=buffer,
            channel=channel,
        )
        running = asyncio.create_task(rollout.run())
        while not running.done() and len(await asyncio.to_thread(buffer.complete, TRAIN_STREAM)) < groups:
            await asyncio.wait([running], timeout=0.2)
            if not (await asyncio.to_thread(buffer.stats)).queued:
                engine.seal()
        await rollout.drain()
        await running
        buffer.close()


async def measure(config: Config, groups: int, rounds: int) -> tuple[dict[str, float], Recorder]:
    """Return the figures, medians over rounds, and the engine, which is still running."""
    config.run.folder.mkdir(parents=True, exist_ok=True)
    engine = Recorder(config.model, config.rollout, config.run.seed)
    await play(config, engine, groups)
    bare = Bare(config)
    bare.ask(engine.asked)
    played = []
    for _ in range(rounds):
        engine.restart()
        await play(config, engine, groups)
        asked, seconds = engine.asked, engine.seconds
        bare_seconds, bare_cached = bare.ask(asked)
        tokens = sum(length for _, length in asked)
        played.append((tokens, seconds, bare_seconds, engine.cached_share, bare_cached))
    bare.end()
    return {
        "rounds": rounds,
        "tokens": median(tokens for tokens, *_ in played),
        "concurrency": config.rollout.episodes_in_flight,
        "actor_tokens_per_s": median(tokens / seconds for tokens, seconds, *_ in played),
        "bare_tokens_per_s": median(tokens / bare for tokens, _, bare, *_ in played),
        "actor_over_bare": median(bare / seconds for _, seconds, bare, *_ in played),
        "actor_cached_share": median(share for *_, share, _ in played),
        "bare_cached_share": median(share for *_, share in played),
    }, engine


def _weights(config: Config) -> Any:
    from services.model_folder import read_weights

    return read_weights(config.model.path)
