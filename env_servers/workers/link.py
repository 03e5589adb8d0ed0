"""Passes requests between the processes of one server: frames over Unix sockets in a private folder.

A frame is its length (4 bytes), a JSON line and a body. A process's socket is named by its number. Numbers are never
reused, so a process that cannot be connected to has ended.

Invariants
- Every call has a time limit and ends with a response, `WorkerGone` or `WorkerSilent`.
- The length of a frame is limited.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import orjson
from starlette.types import ASGIApp, Message

from env_servers.web.problems import problem, respond

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 256 * 1024 * 1024
CALL_LIMIT_S = 60.0
"""Time limit of a response, in addition to what the environment may take."""
LIST_EVERY_S = 0.25

GONE = "the worker process that held the session has ended: reset to start another"
SILENT = "the worker process that holds the session did not answer in time: retry later"
NONE_LEFT = "no worker process has room for a session: retry later, or raise --max-sessions"

_LENGTH = struct.Struct(">I")

Headers = list[tuple[str, str]]


class WorkerGone(Exception):
    """The process has ended."""


class WorkerSilent(Exception):
    """The process did not answer in time."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request that is passed to another process."""

    method: str
    path: str
    query: str = ""
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response as it comes from another process."""

    status: int
    headers: Headers = field(default_factory=list)
    body: bytes = b""


async def call_app(app: ASGIApp, call: Call) -> Answer:
    """Run the application of this process on a request. An unexpected exception becomes a 500."""
    status = 0
    headers: Headers = []
    parts: list[bytes] = []
    received = False

    async def receive() -> Message:
        nonlocal received
        if received:
            return {"type": "http.disconnect"}
        received = True
        return {"type": "http.request", "body": call.body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            headers.extend((name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"])
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "root_path": "",
        "query_string": call.query.encode("latin-1"),
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }
    try:
        await app(scope, receive, send)
    except Exception:
        logger.exception("unexpected error in %s %s", call.method, call.path)
        refusal = respond(problem(500, "unexpected error: see the server's log"))
        return Answer(500, [("content-type", refusal.media_type or "")], bytes(refusal.body))
    return Answer(status, headers, b"".join(parts))


class Links:
    """The links of one process: the socket on which it is called, and those to the other processes.

    Args:
        worker: number of this process.
        folder: folder of the sockets; no other user may enter it.
        environment_s: seconds that the environment may take for a call.

    Attributes:
        worker: number of this process.
    """

    def __init__(self, worker: int, folder: Path, environment_s: float = 0.0) -> None:
        self.worker = worker
        self._limit_s = CALL_LIMIT_S + environment_s
        self._folder = folder
        self._links: dict[int, asyncio.Task[_Outgoing]] = {}
        self._workers: list[int] = []
        self._listed_at = float("-inf")
        self._server: asyncio.AbstractServer | None = None

    async def start(self, app: ASGIApp) -> None:
        """Accept calls of the other processes and pass them to `app`."""
        loop = asyncio.get_running_loop()
        path = self._folder / str(self.worker)
        self._server = await loop.create_unix_server(lambda: _Incoming(app), str(path))

    async def stop(self) -> None:
        with suppress(FileNotFoundError):
            (self._folder / str(self.worker)).unlink()
        if self._server is not None:
            self._server.close()
        for opening in self._links.values():
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                opening.result().close()
            opening.cancel()

    def workers(self) -> list[int]:
        """Numbers of the processes that have a socket, ascending. At most `LIST_EVERY_S` old."""
        now = asyncio.get_running_loop().time()
        if now - self._listed_at > LIST_EVERY_S:
            self._listed_at = now
            self._workers = sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())
        return self._workers

    async def call(self, worker: int, call: Call) -> Answer:
        """Call another process. Raises WorkerGone or WorkerSilent."""
        try:
            async with asyncio.timeout(self._limit_s):
                link = await self._link(worker)
                return await link.call(call)
        except TimeoutError as error:
            raise WorkerSilent from error
        except WorkerGone:
            self._links.pop(worker, None)
            self._listed_at = float("-inf")
            raise

    async def _link(self, worker: int) -> _Outgoing:
        opening = self._links.get(worker)
        if opening is None:
            opening = self._links[worker] = asyncio.create_task(self._open(worker))
        return await asyncio.shield(opening)

    async def _open(self, worker: int) -> _Outgoing:
        try:
            _, link = await asyncio.get_running_loop().create_unix_connection(
                _Outgoing, str(self._folder / str(worker))
            )
        except OSError as error:
            raise WorkerGone from error
        return link


class _Framed(asyncio.Protocol):
    """Splits a stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has transports of its own

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        for head, body in self._frames():
            self.on_frame(head, body)

    def on_frame(self, head: bytes, body: bytes) -> None:
        raise NotImplementedError

    def write(self, head: list[object], body: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            line = orjson.dumps(head)
            self._transport.write(_LENGTH.pack(len(line) + 1 + len(body)) + line + b"\n" + body)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _frames(self) -> Iterator[tuple[bytes, bytes]]:
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                logger.error("frame of %d bytes on a link, the limit is %d: closing the link", length, MAX_FRAME_BYTES)
                self.close()
                return
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            head, _, body = bytes(self._buffer[_LENGTH.size : end]).partition(b"\n")
            del self._buffer[:end]
            yield head, body


class _Outgoing(_Framed):
    """The calling end of a link."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}

    async def call(self, call: Call) -> Answer:
        if self._transport is None or self._transport.is_closing():
            raise WorkerGone
        number = next(self._numbers)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self.write([number, call.method, call.path, call.query], call.body)
            return await answer
        finally:
            self._waiting.pop(number, None)

    def on_frame(self, head: bytes, body: bytes) -> None:
        number, status, headers = orjson.loads(head)
        answer = self._waiting.get(number)
        if answer is not None and not answer.done():
            answer.set_result(Answer(status, headers, body))

    def connection_lost(self, exc: Exception | None) -> None:
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(WorkerGone())


class _Incoming(_Framed):
    """The called end of a link."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app
        self._tasks: set[asyncio.Task[None]] = set()

    def on_frame(self, head: bytes, body: bytes) -> None:
        number, method, path, query = orjson.loads(head)
        task = asyncio.get_running_loop().create_task(self._answer(number, Call(method, path, query, body)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, number: int, call: Call) -> None:
        answer = await call_app(self._app, call)
        self.write([number, answer.status, answer.headers], answer.body)
