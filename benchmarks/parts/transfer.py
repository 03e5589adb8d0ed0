"""A version of 1 GiB in bfloat16 on its way from the learner's rank to the engine, on one node.

A real rank takes the snapshot and sends it; this process is the actor, with vLLM in a process of its own. Times begin
with the call of the rank, when the optimizer step is done:

- `learner_idle`: until the rank may begin its next update.
- `verified`: until the version is verified in the memory that the engine maps.
- `loaded`: until the engine samples with it, its packing for the kernels included.

The memory is the sum of the proportional sizes of all processes involved, at its peak during an update, less what they
had before the first version, and less one copy of the version; the other shared copy is part of it, and so is what the
engine keeps of its first update. `transient` is what an update adds to the memory at rest. The event loop's stall is
how much later than asked a sleeping task of the actor wakes up.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from actors.engine.process import EngineProcess
from benchmarks.parts.weights import memcpy_gb_per_s
from learner.rank.group import RankGroup
from services.config.tree import Config
from services.weights.ray_store import NAMESPACE, RayChannel

MIB = 1024
HIDDEN, MLP, LAYERS = 1024, 4096, 32
WARM_UP = 3
TICK_S = 0.001
SAMPLE_S = 0.02


def write_model(like: Path, folder: Path) -> int:
    """Write a model of about `MIB` MiB of random bfloat16 with the tokenizer of `like`; return its bytes."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    facts = json.loads((like / "config.json").read_text())
    facts |= {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": 16}
    facts |= {"num_key_value_heads": 16, "layer_types": ["full_attention"] * LAYERS, "tie_word_embeddings": False}
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen2ForCausalLM(Qwen2Config(**facts))
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


@dataclass(frozen=True)
class Times:
    """Seconds from the end of the optimizer step, see the module."""

    idle: float
    verified: float
    loaded: float


class Transfer:
    """One rank, one engine, and the channel between them."""

    def __init__(self, ranks: RankGroup, engine: EngineProcess, channel: RayChannel) -> None:
        self._ranks = ranks
        self._engine = engine
        self._channel = channel

    async def once(self, version: int) -> Times:
        """Publish and load a version."""
        began = time.perf_counter()
        await asyncio.to_thread(self._ranks.publish, version, self._channel)
        idle = time.perf_counter() - began
        delivery = await asyncio.to_thread(self._bring, version)
        verified = time.perf_counter() - began
        await self._engine.load_delivery(delivery)
        return Times(idle, verified, time.perf_counter() - began)

    def _bring(self, version: int) -> Any:
        while (newest := self._channel.latest()) is None or newest.version != version:
            time.sleep(TICK_S)
        return self._channel.bring(newest)


class EventLoop:
    """Measures how late the event loop of this process is."""

    def __init__(self) -> None:
        self.stall = 0.0

    async def watch(self) -> None:
        """Run until cancelled."""
        while True:
            began = time.perf_counter()
            await asyncio.sleep(TICK_S)
            self.stall = max(self.stall, time.perf_counter() - began - TICK_S)


class Memory:
    """Samples the memory of processes in a thread. A context manager."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak = 0

    def now(self) -> int:
        """Their memory in bytes; what several of them share counts once."""
        return sum(process.memory_full_info().pss for process in self._processes)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.peak = max(self.peak, self.now())


async def measure(config: Config, ranks: RankGroup, nbytes: int, rounds: int) -> dict[str, float]:
    """Return the figures; `ranks` have loaded a model of `nbytes`, as `config` says."""
    channel = RayChannel("bench-transfer", 300.0)
    channel.latest()
    engine = EngineProcess(config.model, config.rollout)
    await engine.start()
    try:
        return await _measure(Transfer(ranks, engine, channel), _pids(ranks, engine), nbytes, rounds)
    finally:
        await engine.stop()
        channel.close_run()


async def _measure(transfer: Transfer, pids: Sequence[int], nbytes: int, rounds: int) -> dict[str, float]:
    before = Memory(pids).now()
    first = await transfer.once(1)
    for version in range(2, WARM_UP + 1):
        await transfer.once(version)
    loop = EventLoop()
    watching = asyncio.create_task(loop.watch())
    times = [await transfer.once(WARM_UP + 1 + number) for number in range(rounds)]
    watching.cancel()
    rest = Memory(pids).now()
    with Memory(pids) as memory:
        await transfer.once(WARM_UP + 1 + rounds)
    idle, verified, loaded = (median(getattr(each, name) for each in times) for name in ("idle", "verified", "loaded"))
    memcpy, size = memcpy_gb_per_s(MIB), nbytes / 1e9
    return {
        "gb": size,
        "memcpy_gb_per_s": memcpy,
        "first_loaded_s": first.loaded,
        "learner_idle_s": idle,
        "verified_s": verified,
        "loaded_s": loaded,
        "verified_over_memcpy": size / verified / memcpy,
        "loaded_over_memcpy": size / loaded / memcpy,
        "learner_idle_share": idle / loaded,
        "event_loop_stall_s": loop.stall,
        "extra_memory_over_model": (memory.peak - before - nbytes) / nbytes,
        "transient_memory_over_model": (memory.peak - rest) / nbytes,
    }


def _pids(ranks: RankGroup, engine: EngineProcess) -> list[int]:
    import ray

    holder = ray.get_actor("weights-bench-transfer", namespace=NAMESPACE)
    assert engine.pid is not None
    return [os.getpid(), engine.pid, *ranks.pids, ray.get(holder.__ray_call__.remote(lambda _: os.getpid()))]
