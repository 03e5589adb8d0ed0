"""Trajectories through the buffer, compared with raw `SET`/`GET` of the same bytes and with a stream of pickles.

Both sides use one Redis, one process, one connection, and one command at a time. The figures:

- `store_read`: `Buffer.store` of each trajectory and `Buffer.read` of each group, without the time of the codec.
- `raw`: `SET` of the encoded trajectory, `GET` and decoding, in the same loops, without the time of the codec.
- `…_with_codec`: the same with the time of the codec. `bare_raw`: raw commands on documents encoded beforehand.
- `whole_way`: the buffer with the codec and its tickets: issue, lease, removal.
- `pickle_stream`: as PipelineRL does: `XADD` of a pickle, `XREAD`, `pickle.loads`, without acknowledgement or lease.
"""

from __future__ import annotations

import pickle
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
from redis import Redis

from services.buffer import Buffer
from services.codec import decode, encode
from services.config.tree import BufferConfig
from services.redis_server import EmbeddedRedis
from services.schemas import TRAIN_STREAM, Step, Task, Ticket, Trajectory, VersionSpan

_A = TypeVar("_A")
_B = TypeVar("_B")

RawRedis = Any
"""A redis-py client. Its type is Any, since redis-py's stubs type every reply as possibly awaitable."""

GROUP_SIZE = 8
STEPS, PROMPT_TOKENS, RESPONSE_TOKENS = 20, 400, 10
LEASE_S = 600.0
ROUNDS = 9


def episode(ticket: Ticket, rng: np.random.Generator) -> Trajectory:
    """Return a trajectory as long as an ALFWorld episode; each prompt extends the previous one, as in real ones."""
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


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Stopwatch:
    """Total time spent in the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[[_A], _B]) -> Callable[[_A], _B]:
        def timed(argument: _A) -> _B:
            began = time.perf_counter()
            result = function(argument)
            self.seconds += time.perf_counter() - began
            return result

        return timed


def through_buffer(buffer: Buffer, played: Sequence[Trajectory]) -> dict[str, float]:
    """Return the seconds of each figure of the buffer."""
    codec = Stopwatch()
    groups = range(len(played) // GROUP_SIZE)
    with (
        patch("services.buffer.buffer.encode", codec.around(encode)),
        patch("services.buffer.buffer.decode", codec.around(decode)),
    ):
        tickets = seconds(lambda: buffer.issue([trajectory.ticket for trajectory in played]))
        tickets += seconds(lambda: buffer.lease("actor", len(played), LEASE_S))
        stored = seconds(lambda: [buffer.store(trajectory) for trajectory in played])
        read = seconds(lambda: [buffer.read(TRAIN_STREAM, group) for group in groups])
        tickets += seconds(lambda: buffer.remove(TRAIN_STREAM, groups))
    return {
        "store_read": stored + read - codec.seconds,
        "store_read_with_codec": stored + read,
        "whole_way": stored + read + tickets,
    }


def raw(client: RawRedis, played: Sequence[Trajectory]) -> dict[str, float]:
    """Return the seconds of raw commands, with documents encoded and decoded in the same loop or beforehand."""
    codec = Stopwatch()
    packing, unpacking = codec.around(encode), codec.around(decode)
    documents = [encode(trajectory) for trajectory in played]
    whole = seconds(lambda: [client.set(f"raw:{n}", packing(trajectory)) for n, trajectory in enumerate(played)])
    whole += seconds(lambda: [unpacking(client.get(f"raw:{n}")) for n in range(len(played))])
    bare = seconds(lambda: [client.set(f"raw:{n}", document) for n, document in enumerate(documents)])
    bare += seconds(lambda: [client.get(f"raw:{n}") for n in range(len(played))])
    return {"raw": whole - codec.seconds, "raw_with_codec": whole, "bare_raw": bare}


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
    """Measure the sides in turn; the figures are medians over rounds, after one warm-up round."""
    rng = np.random.default_rng(0)
    task = Task(env="alfworld", split="train", index=0)
    played = [
        episode(Ticket(group=g, member=m, group_size=GROUP_SIZE, task=task, seed=0), rng)
        for g in range(groups)
        for m in range(GROUP_SIZE)
    ]
    megabytes = sum(len(encode(trajectory)) for trajectory in played) / 1e6
    rounds: list[dict[str, float]] = []
    with EmbeddedRedis(folder / "redis") as server, Redis.from_url(server.url) as client:
        buffer = Buffer.connect(server.url, f"bench-{uuid.uuid4().hex[:8]}", BufferConfig())
        for _ in range(ROUNDS + 1):
            through = through_buffer(buffer, played)
            through |= raw(client, played)
            through["pickle_stream"] = seconds(lambda: stream(client, played))
            rounds.append(through)
        buffer.close()
    spent = {name: median(taken[name] for taken in rounds[1:]) for name in rounds[0]}
    return {
        "trajectories": len(played),
        "bytes_per_trajectory": 1e6 * megabytes / len(played),
        "pickled_bytes_per_trajectory": sum(len(pickle.dumps(trajectory)) for trajectory in played) / len(played),
        **{f"{name}_per_s": len(played) / taken for name, taken in spent.items()},
        **{f"{name}_mb_per_s": megabytes / spent[name] for name in ("store_read", "store_read_with_codec", "raw")},
        "store_read_over_raw": spent["raw"] / spent["store_read"],
        "store_read_with_codec_over_raw": spent["raw_with_codec"] / spent["store_read_with_codec"],
        "store_read_over_bare_raw": spent["bare_raw"] / spent["store_read"],
        "whole_way_over_pickle_stream": spent["pickle_stream"] / spent["whole_way"],
    }
