"""Agents in a process of their own, for `benchmarks.parts.agents`: many conversations through a gateway at a time.

    python -m benchmarks.parts.agent_clients

One JSON document (`Job`) is read from standard input, and `ready` written. Then each line of input starts the next
phase, and each phase is answered by one line: the JSON list of the seconds that its calls took.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import orjson

LIMIT_S = 600.0
RESULT = "You open the drawer 1. The drawer 1 is open. In it, you see a pen 1, a book 2 and a key chain 1."
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """What the agents do.

    Attributes:
        url: of the gateway.
        kind: `raw`: HTTP over plain sockets, `openai`: the `openai` package.
        keys: of the episodes.
        in_flight: episodes at the same time.
        phases: number of calls of each episode in each phase. A phase ends when all episodes have made theirs.
        longest: a conversation of this many messages is not continued: its last message becomes another one.
        tools: that each request declares.
        max_tokens: of an answer.
        stagger_s: the episodes of a phase begin within this time, evenly.
    """

    url: str
    kind: str
    keys: list[str]
    in_flight: int
    phases: list[int]
    longest: int
    tools: list[dict[str, Any]]
    max_tokens: int
    stagger_s: float = 0.0


class Connection(Protocol):
    """Asks the policy within one episode."""

    async def ask(self, messages: Messages) -> dict[str, Any]:
        """The assistant's message."""

    async def close(self) -> None:
        """Disconnect."""


class Raw:
    """As little as a client can do: one kept connection, and only what this gateway's responses need to be read."""

    def __init__(self, job: Job, key: str) -> None:
        self._job = job
        address = urlsplit(job.url)
        self._host, self._port = str(address.hostname), address.port or 80
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._host}\r\nauthorization: Bearer {key}\r\n"
        self._head = f"{head}content-type: application/json\r\ncontent-length: ".encode()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, messages: Messages) -> dict[str, Any]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        body = {"model": "policy", "messages": messages, "max_tokens": self._job.max_tokens}
        data = orjson.dumps(body | {"tools": self._job.tools} if self._job.tools else body)
        writer.write(b"%b%d\r\n\r\n%b" % (self._head, len(data), data))
        head = await reader.readuntil(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        answer = orjson.loads(await reader.readexactly(int(lengths[0].partition(b":")[2])))
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the gateway refused: {answer}")
        message: dict[str, Any] = answer["choices"][0]["message"]
        return message

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


class OpenAI:
    """The `openai` package, as agents use it."""

    def __init__(self, job: Job, key: str) -> None:
        from openai import AsyncOpenAI

        self._job = job
        self._client = AsyncOpenAI(base_url=f"{job.url}/v1", api_key=key, max_retries=0)

    async def ask(self, messages: Messages) -> dict[str, Any]:
        more: Any = {"tools": self._job.tools} if self._job.tools else {}
        limit = self._job.max_tokens
        sent: Any = messages
        answer = await self._client.chat.completions.create(model="policy", messages=sent, max_tokens=limit, **more)
        message: dict[str, Any] = answer.choices[0].message.model_dump(exclude_none=True)
        return message

    async def close(self) -> None:
        await self._client.close()


@dataclass
class Episode:
    """A conversation that goes on over the phases."""

    number: int
    connection: Connection
    messages: Messages = field(default_factory=list)

    def __post_init__(self) -> None:
        task = f"{self.number}: put a pen on the desk."
        self.messages = [{"role": "system", "content": "You are in a house. " * 20}, {"role": "user", "content": task}]

    async def play(self, job: Job, calls: int, times: list[float]) -> None:
        """Make so many calls."""
        for call in range(calls):
            began = time.perf_counter()
            answer = await self.connection.ask(self.messages)
            times.append(time.perf_counter() - began)
            told = f"{call} {RESULT}"
            if len(self.messages) >= job.longest:
                self.messages = [*self.messages[:-1], self.messages[-1] | {"content": told}]
                continue
            self.messages.append({"role": "assistant", **answer})
            ids = [made["id"] for made in answer.get("tool_calls") or ()]
            self.messages += [{"role": "tool", "tool_call_id": id, "content": told} for id in ids]
            if not ids:
                self.messages.append({"role": "user", "content": told})


async def phase(job: Job, episodes: list[Episode], calls: int) -> list[float]:
    """All episodes make so many calls each, `in_flight` of them at the same time; the seconds of each call."""
    times: list[float] = []
    waiting = iter(episodes)

    async def work(place: int) -> None:
        await asyncio.sleep(job.stagger_s * place / job.in_flight)
        for episode in waiting:
            await episode.play(job, calls, times)

    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(*(work(place) for place in range(job.in_flight)))
    return times


async def main() -> None:
    job = Job(**json.loads(sys.stdin.readline()))
    kind = Raw if job.kind == "raw" else OpenAI
    episodes = [Episode(number, kind(job, key)) for number, key in zip(itertools.count(), job.keys)]
    print("ready", flush=True)
    try:
        for calls in job.phases:
            if not await asyncio.to_thread(sys.stdin.readline):
                return
            print(json.dumps(await phase(job, episodes, calls)), flush=True)
    finally:
        for episode in episodes:
            await episode.connection.close()


if __name__ == "__main__":
    asyncio.run(main())
