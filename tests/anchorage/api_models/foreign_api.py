"""An OpenAI-compatible server whose answers a test decides, on a loopback port and an event loop of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Handler = Callable[["Asked"], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Asked:
    """One request: its number from 0, its body, and its headers."""

    number: int
    body: dict[str, Any]
    headers: dict[str, str]
    path: str
    hold: asyncio.Event
    """Set when the server ends: what a hanging answer waits for."""

    @property
    def last(self) -> str:
        """The text of the last message."""
        return str(self.body["messages"][-1]["content"])


@dataclass
class ForeignApi:
    """A running server.

    Attributes:
        url: base URL. asked: all requests so far.
    """

    url: str = ""
    asked: list[Asked] = field(default_factory=list)


def says(text: str | None, **message: object) -> web.Response:
    """An answer of the model. `usage` and `finish_reason` may be replaced."""
    usage = message.pop("usage", {"prompt_tokens": 100, "completion_tokens": 7})
    ended = message.pop("finish_reason", "stop")
    choice = {"index": 0, "finish_reason": ended, "message": {"role": "assistant", "content": text, **message}}
    return web.json_response({"object": "chat.completion", "choices": [choice], "usage": usage})


def fails(status: int, message: str, headers: dict[str, str] | None = None, **error: object) -> web.Response:
    """An error as OpenAI writes it."""
    return web.json_response({"error": {"message": message, **error}}, status=status, headers=headers)


@contextmanager
def foreign_api(handler: Handler) -> Iterator[ForeignApi]:
    """Run a server that answers each POST with `handler`."""
    api = ForeignApi()
    loop = asyncio.new_event_loop()
    ready, ended = threading.Event(), asyncio.Event()
    hold = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        asked = Asked(len(api.asked), body, dict(request.headers), request.path_qs, hold)
        api.asked.append(asked)
        return await handler(asked)

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/{path:.*}", answer)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server = site._server
        assert isinstance(server, asyncio.Server)
        api.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        await ended.wait()
        hold.set()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield api
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(30)
        loop.close()
