"""An inference engine that answers by rule: real batching of callers, no model."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from actors.engine.interface import EngineFailed, EngineStats, InferenceEngine, Sample
from actors.prompts import load_tokenizer
from services.config.tree import Config
from services.schemas import VersionSpan
from tests.actors.tokenizer import END, write_tokenizer

if TYPE_CHECKING:
    import torch


@dataclass
class ScriptedEngine(InferenceEngine):
    """Says `up`, or `down` for every fourth seed. `broken` makes it fail, `hangs` never end an update.

    Attributes:
        seeds: of all requests, in order. loads: version and number of requests in flight, of every load.
        sleeps: number of requests in flight, of every time it fell asleep; they wait for the load that wakes it.
    """

    folder: Path
    delay_s: float = 0.0
    broken: bool = False
    hangs: bool = False
    seeds: list[int] = field(default_factory=list)
    loads: list[tuple[int, int]] = field(default_factory=list)
    sleeps: list[int] = field(default_factory=list)
    stopped: bool = False

    def __post_init__(self) -> None:
        self.answering = asyncio.Event()
        self.answering.set()
        self.loading = asyncio.Event()
        self.loading.set()
        self.awake = asyncio.Event()
        self.awake.set()
        self._version = -1
        self._running = 0
        self._tokens = 0
        self._tokenizer = load_tokenizer(self.folder)

    @property
    def version(self) -> int:
        return self._version

    async def start(self) -> None:
        self._version = 0

    async def generate(
        self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int, stop: Sequence[str] = ()
    ) -> Sample:
        self.seeds.append(seed)
        self._running += 1
        try:
            await asyncio.sleep(self.delay_s)
            await self.answering.wait()
            await self.awake.wait()
        finally:
            self._running -= 1
        if self.broken:
            raise EngineFailed("the engine is broken")
        text = "down" if seed % 4 == 0 else "up"
        whole = [*self._tokenizer.encode(text), END]
        ids = whole[:max_tokens]
        self._tokens += len(ids)
        spans = (VersionSpan(self._version, len(ids)),)
        return Sample(ids, [-0.5] * len(ids), spans, text, finished=len(ids) == len(whole))

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        await self.loading.wait()
        self.loads.append((version, self._running))
        self._version = version
        self.awake.set()

    async def sleep(self) -> None:
        self.sleeps.append(self._running)
        self.awake.clear()

    async def load_initial(self) -> None:
        await self.load_weights(0, {})

    async def stop(self) -> None:
        self.stopped = True

    def stats(self) -> EngineStats:
        return EngineStats(response_tokens=self._tokens, running=self._running)


def tokenizer_folder(folder: Path) -> Path:
    """A model folder as far as anybody but an engine looks."""
    write_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "model.safetensors").touch()
    return folder


def scripted(config: Config) -> InferenceEngine:
    """For the pool: slow enough that an actor can be killed in the middle."""
    return ScriptedEngine(config.model.path, delay_s=0.05)
