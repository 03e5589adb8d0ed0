"""A policy version on its way: bytes a second from publisher to readers beside `memcpy`, and time to its first token.

Readers are processes that fetch at the same time. Ray's object store is shared memory on one node: its figure holds
serialisation, checksum and both copies. The time to the first token is that of one engine that follows the channel.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from actors.engine import InferenceEngine
from actors.weights import WeightFollower
from services.config.tree import WeightsConfig
from services.weights import open_channel
from services.weights.directory import DirectoryChannel

TENSORS = 16
TIMEOUT_S = 300.0
RUN = "bench"


def tensors(mib: int) -> dict[str, torch.Tensor]:
    count = mib * 2**20 // 4 // TENSORS
    return {f"layer.{number}": torch.full((count,), float(number)) for number in range(TENSORS)}


def memcpy_gb_per_s(mib: int) -> float:
    source, target = np.ones(mib * 2**20, dtype=np.uint8), np.empty(mib * 2**20, dtype=np.uint8)
    target[:] = 0
    began = time.perf_counter()
    target[:] = source
    return source.nbytes / 1e9 / (time.perf_counter() - began)


def _read(folder: Path, pipe: Connection) -> None:
    """A reader: says that it is up, waits for the word, fetches the newest version."""
    channel = DirectoryChannel(folder, TIMEOUT_S)
    pipe.send("up")
    pipe.recv()
    wanted = channel.latest()
    assert wanted is not None
    channel.fetch(wanted)
    pipe.send("done")


def broadcast(folder: Path, mib: int, readers: int) -> dict[str, float]:
    """GB/s of publishing one version and of fetching it, over all readers."""
    channel, payload = DirectoryChannel(folder, TIMEOUT_S), tensors(mib)
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(readers)]
    processes = [context.Process(target=_read, args=(folder, there)) for _, there in pairs]
    for process, (_, there) in zip(processes, pairs, strict=True):
        process.start()
        there.close()  # what a reader's process alone holds ends with it: its death is an error here, no wait for ever
    for here, _ in pairs:
        here.recv()
    began = time.perf_counter()
    published = channel.publish(1, payload)
    announced = time.perf_counter()
    for here, _ in pairs:
        here.send("go")
    for here, _ in pairs:
        here.recv()
    fetched = time.perf_counter()
    for process in processes:
        process.join(TIMEOUT_S)
    return {
        "mib": mib,
        "readers": readers,
        "publish_gb_per_s": published.nbytes / 1e9 / (announced - began),
        "fetch_gb_per_s": readers * published.nbytes / 1e9 / (fetched - announced),
        "seconds": fetched - began,
        "memcpy_gb_per_s": memcpy_gb_per_s(mib),
    }


async def to_first_token(
    engine: InferenceEngine, folder: Path, policy: dict[str, torch.Tensor], rounds: int
) -> dict[str, float]:
    """Seconds from the end of an optimizer step to the first token of the new version, requests in flight meanwhile."""
    config = WeightsConfig(channel="directory", directory=folder)
    channel = open_channel(config, RUN, folder)
    follower = WeightFollower(channel, engine, config)
    channel.publish(engine.version + 1, policy)
    await follower.first()
    following = asyncio.create_task(follower.follow())
    load = [asyncio.create_task(_busy(engine, number)) for number in range(16)]
    before = engine.stats()
    times = []
    try:
        for _ in range(rounds):
            wanted = engine.version + 1
            began = time.perf_counter()
            await asyncio.to_thread(channel.publish, wanted, policy)
            while (await _token(engine)) < wanted:
                pass
            times.append(time.perf_counter() - began)
    finally:
        for task in (following, *load):
            task.cancel()
        await asyncio.gather(following, *load, return_exceptions=True)
    after = engine.stats()
    updates = after.updates - before.updates
    return {
        "first_token_s": sorted(times)[len(times) // 2],
        "pause_s": (after.update_seconds - before.update_seconds) / max(1, updates),
        "requests_in_flight": len(load),
    }


async def _token(engine: InferenceEngine) -> int:
    """Samples one token; the version that wrote it."""
    sample = await engine.generate([1, 2, 3], temperature=1.0, max_tokens=1, seed=0)
    return sample.versions[-1].version


async def _busy(engine: InferenceEngine, number: int) -> None:
    prompt = [2 + (number + place) % 50 for place in range(200)]
    while True:
        await engine.generate(prompt, temperature=1.0, max_tokens=12, seed=number)
