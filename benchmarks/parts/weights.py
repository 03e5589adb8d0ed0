"""Transfer of a policy version: GB/s from publisher to readers compared with `memcpy`, and time to its first token.

Readers are processes that fetch concurrently, through shared memory and through a directory. Both include layout,
checksum and copies; the memory is new for each version, as for the first ones of a run. The time to the first token
begins at the end of an optimizer step, when only the learner's rank has the weights. The cost of an update for requests
in flight is how much longer they take than others; it includes the engine's pause and the recomputation of their cache.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np
import torch

from actors.engine.interface import InferenceEngine
from actors.weights import WeightFollower
from services.config.tree import WeightsConfig
from services.weights import StoringChannel, WeightChannel, open_channel

TENSORS = 16
TIMEOUT_S = 300.0
RUN = "bench"


class Ranks(Protocol):
    """The learner's ranks, reduced to what publishes their weights."""

    def publish(self, version: int, channel: WeightChannel) -> None: ...


def tensors(mib: int) -> dict[str, torch.Tensor]:
    count = mib * 2**20 // 4 // TENSORS
    return {f"layer.{number}": torch.full((count,), float(number)) for number in range(TENSORS)}


def memcpy_gb_per_s(mib: int) -> float:
    source, target = np.ones(mib * 2**20, dtype=np.uint8), np.empty(mib * 2**20, dtype=np.uint8)
    target[:] = 0
    began = time.perf_counter()
    target[:] = source
    return source.nbytes / 1e9 / (time.perf_counter() - began)


class Reader:
    """Ray actor that fetches the newest version."""

    def __init__(self, config: str, folder: str) -> None:
        self._channel = open_channel(WeightsConfig.model_validate_json(config), RUN, Path(folder))

    def fetch(self) -> None:
        wanted = self._channel.latest()
        assert wanted is not None
        assert isinstance(self._channel, StoringChannel)
        self._channel.fetch(wanted)


def broadcast(config: WeightsConfig, folder: Path, mib: int, readers: int) -> dict[str, object]:
    """Return GB/s of publishing one version, and of fetching it, summed over readers. Requires an initialised Ray."""
    import ray

    channel, payload = open_channel(config, RUN, folder), tensors(mib)
    actors = [
        ray.remote(Reader).options(num_cpus=0).remote(config.model_dump_json(), str(folder)) for _ in range(readers)
    ]
    ray.get([actor.__ray_ready__.remote() for actor in actors], timeout=TIMEOUT_S)
    channel.latest()  # creates the channel's store before the first version
    began = time.perf_counter()
    published = channel.publish(1, payload)
    announced = time.perf_counter()
    ray.get([actor.fetch.remote() for actor in actors], timeout=TIMEOUT_S)
    fetched = time.perf_counter()
    for actor in actors:
        ray.kill(actor)
    channel.close_run()
    channel.close()
    return {
        "channel": config.channel,
        "mib": mib,
        "readers": readers,
        "publish_gb_per_s": published.nbytes / 1e9 / (announced - began),
        "fetch_gb_per_s": readers * published.nbytes / 1e9 / (fetched - announced),
        "seconds": fetched - began,
        "memcpy_gb_per_s": memcpy_gb_per_s(mib),
    }


async def to_first_token(engine: InferenceEngine, folder: Path, ranks: Ranks, rounds: int) -> dict[str, float]:
    """Return seconds from the end of an optimizer step to the new version's first token, with requests in flight."""
    config = WeightsConfig()
    channel = open_channel(config, RUN, folder)
    follower = WeightFollower(channel, engine, config)

    def publish(version: int) -> None:
        ranks.publish(version, channel)

    publish(engine.version + 1)
    await follower.first()
    following = asyncio.create_task(follower.follow())
    taken: list[tuple[float, bool]] = []
    load = [asyncio.create_task(_busy(engine, number, taken)) for number in range(16)]
    before = engine.stats()
    times = []
    try:
        for _ in range(rounds):
            await asyncio.sleep(0.5)  # time for responses without an update
            wanted = engine.version + 1
            began = time.perf_counter()
            await asyncio.to_thread(publish, wanted)
            while (await _token(engine)) < wanted:
                pass
            times.append(time.perf_counter() - began)
    finally:
        for task in (following, *load):
            task.cancel()
        await asyncio.gather(following, *load, return_exceptions=True)
        channel.close_run()
        channel.close()
    after = engine.stats()
    updates = after.updates - before.updates
    met, spared = ([seconds for seconds, updated in taken if updated is which] for which in (True, False))
    return {
        "first_token_s": median(times),
        "pause_s": (after.update_seconds - before.update_seconds) / max(1, updates),
        "requests_in_flight": len(load),
        "response_s": median(spared),
        "response_across_an_update_s": median(met),
    }


async def _token(engine: InferenceEngine) -> int:
    """Sample one token; return the version that sampled it."""
    sample = await engine.generate([1, 2, 3], temperature=1.0, max_tokens=1, seed=0)
    return sample.versions[-1].version


async def _busy(engine: InferenceEngine, number: int, taken: list[tuple[float, bool]]) -> None:
    """Send requests in a loop; record the seconds of each response, and whether an update happened during it."""
    prompt = [2 + (number + place) % 50 for place in range(200)]
    while True:
        began = time.perf_counter()
        sample = await engine.generate(prompt, temperature=1.0, max_tokens=12, seed=number)
        taken.append((time.perf_counter() - began, len(sample.versions) > 1))
