"""Trajectories through the buffer, beside raw `SET`/`GET` of the same bytes and a stream of pickles, in one Redis.

The buffer's figure is given with and without the codec: raw commands neither pack nor compress. The stream is what
PipelineRL keeps: `XADD` of a pickle, `XREAD`, `pickle.loads`, nothing acknowledged, nothing leased.
"""

from __future__ import annotations

import pickle
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from redis import Redis

from services.buffer import Buffer
from services.codec import decode, encode
from services.config.tree import BufferConfig
from services.redis_server import EmbeddedRedis
from services.schemas import TRAIN_STREAM, Step, Task, Ticket, Trajectory, VersionSpan

RawRedis = Any
"""A redis-py client: its stubs type every answer as one that may be awaited."""

GROUP_SIZE = 8
STEPS, PROMPT_TOKENS, RESPONSE_TOKENS = 20, 400, 10
LEASE_S = 600.0
ROUNDS = 3


def episode(ticket: Ticket, rng: np.random.Generator) -> Trajectory:
    """As long as an ALFWorld episode; each prompt goes on where the last one ended, as a real one does."""
    tokens = rng.integers(0, 2048, PROMPT_TOKENS + STEPS * RESPONSE_TOKENS).astype(np.int32)
    text = "".join(chr(97 + int(token) % 26) for token in tokens)
    steps = []
    for number in range(STEPS):
        length = PROMPT_TOKENS // 2 + number * RESPONSE_TOKENS
        steps.append(
            Step(
                prompt_ids=tokens[:length],
                response_ids=tokens[length : length + RESPONSE_TOKENS],
                logprobs=rng.uniform(-5, 0, RESPONSE_TOKENS).astype(np.float32),
                versions=(VersionSpan(0, RESPONSE_TOKENS),),
                anchor=text[:200],
                observation=text[length : length + 200],
                prompt=text[:length],
                response=text[:20],
                action=text[:20],
                reward=0.0,
                valid=True,
            )
        )
    return Trajectory(ticket, tuple(steps))


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def through_buffer(buffer: Buffer, played: Sequence[Trajectory]) -> None:
    """The whole way: issue, lease, store, read, acknowledge."""
    buffer.issue([trajectory.ticket for trajectory in played])
    buffer.lease("actor", len(played), LEASE_S)
    for trajectory in played:
        buffer.store(trajectory)
    groups = buffer.complete(TRAIN_STREAM)
    for group in groups:
        buffer.read(TRAIN_STREAM, group)
    buffer.remove(TRAIN_STREAM, groups)


def through_codec(played: Sequence[Trajectory]) -> None:
    for trajectory in played:
        decode(encode(trajectory))


def raw(client: RawRedis, documents: Sequence[bytes]) -> None:
    for number, document in enumerate(documents):
        client.set(f"raw:{number}", document)
    for number in range(len(documents)):
        client.get(f"raw:{number}")
    client.delete(*(f"raw:{number}" for number in range(len(documents))))


def stream(client: RawRedis, played: Sequence[Trajectory]) -> None:
    for trajectory in played:
        client.xadd("stream", {"data": pickle.dumps(trajectory)})
    last, left = "0", len(played)
    while left:
        [[_, entries]] = client.xread({"stream": last}, count=GROUP_SIZE)
        for _, fields in entries:
            pickle.loads(fields[b"data"])
        last, left = entries[-1][0], left - len(entries)
    client.delete("stream")


def measure(folder: Path, groups: int) -> dict[str, float]:
    """Each way takes turns, the best of its rounds counts."""
    rng = np.random.default_rng(0)
    task = Task(env="alfworld", split="train", index=0)
    played = [
        episode(Ticket(group=g, member=m, group_size=GROUP_SIZE, task=task, seed=0), rng)
        for g in range(groups)
        for m in range(GROUP_SIZE)
    ]
    documents = [encode(trajectory) for trajectory in played]
    nbytes = sum(map(len, documents))
    best: dict[str, float] = {}
    with EmbeddedRedis(folder / "redis") as server, Redis.from_url(server.url) as client:
        buffer = Buffer.connect(server.url, f"bench-{uuid.uuid4().hex[:8]}", BufferConfig())
        ways: dict[str, Callable[[], None]] = {
            "buffer": lambda: through_buffer(buffer, played),
            "codec": lambda: through_codec(played),
            "raw": lambda: raw(client, documents),
            "pickle_stream": lambda: stream(client, played),
        }
        for _ in range(ROUNDS):
            for name, way in ways.items():
                best[name] = min(best.get(name, float("inf")), seconds(way))
        buffer.close()
    redis_only = best["buffer"] - best["codec"]
    return {
        "trajectories": len(played),
        "bytes_per_trajectory": nbytes / len(played),
        "pickled_bytes_per_trajectory": sum(len(pickle.dumps(trajectory)) for trajectory in played) / len(played),
        **{f"{name}_per_s": len(played) / spent for name, spent in best.items()},
        "buffer_without_codec_per_s": len(played) / redis_only,
        "buffer_mb_per_s": nbytes / 1e6 / redis_only,
        "raw_mb_per_s": nbytes / 1e6 / best["raw"],
        "without_codec_over_raw": best["raw"] / redis_only,
        "buffer_over_pickle_stream": best["pickle_stream"] / best["buffer"],
    }
