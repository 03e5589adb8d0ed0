"""Middleware of every request: metrics, limits of number and size, the token, compression.

Plain ASGI, for speed.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from env_servers.protocol import Problem
from env_servers.web.metrics import ServerMetrics
from env_servers.web.problems import problem, respond

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"})
COMPRESSED_FROM_BYTES = 32 * 1024
BODY_LIMIT_S = 30.0


class Accounting:
    """Measures each request, and turns an unhandled exception into a 500 that reveals nothing about it.

    A client that disconnects before its request is complete is no error. Beyond `max_requests` concurrent requests the
    response is 503, except for the open paths.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, max_requests: int) -> None:
        self._app = app
        self._metrics = metrics
        self._max_requests = max_requests
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        began = time.perf_counter()
        self._under_way += 1
        try:
            if self._under_way > self._max_requests and scope["path"] not in OPEN_PATHS:
                await respond(self._refusal(), {"Retry-After": "1"})(scope, receive, watch)
                return
            await self._app(scope, receive, watch)
        except ClientDisconnect:
            logger.debug("client disconnected before its request to %s was complete", scope["path"])
        except Exception:
            logger.exception("unexpected error in %s %s", scope["method"], scope["path"])
            if status:
                raise
            await respond(problem(500, "unexpected error: see the server's log"))(scope, receive, watch)
        finally:
            self._under_way -= 1
            self._metrics.observe(scope["path"], status, time.perf_counter() - began)

    def _refusal(self) -> Problem:
        return problem(503, f"the limit of {self._max_requests} concurrent requests is reached: retry later")


class TokenGuard:
    """Passes on only requests and WebSockets with the right token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._bears_token(scope):
            await self._app(scope, receive, send)
            return
        refusal = problem(401, "missing or invalid bearer token")
        await respond(refusal, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _bears_token(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, token = value.partition(b" ")
                return scheme.lower() == b"bearer" and hmac.compare_digest(token, self._token)
        return False


class CompressedBatches:
    """Compresses long responses to batches for clients that accept it. It does not pay for a single step."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._compressed = GZipMiddleware(app, minimum_size=COMPRESSED_FROM_BYTES, compresslevel=1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        batch = scope["type"] == "http" and scope["path"].startswith("/batch/")
        await (self._compressed if batch else self._app)(scope, receive, send)


class BodyLimit:
    """Refuses bodies longer than `max_bytes`, with or without a content length, and bodies that arrive too slowly."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length")
        if announced is None or (announced.isdecimal() and int(announced) <= self._max_bytes):
            await self._app(scope, self._counting(receive), send)
        else:
            await respond(self._refusal())(scope, receive, send)

    def _counting(self, receive: Receive) -> Receive:
        received = 0

        async def counted() -> Message:
            nonlocal received
            try:
                async with asyncio.timeout(BODY_LIMIT_S):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"the body did not arrive within {BODY_LIMIT_S:g} s") from error
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, self._refusal().detail)
            return message

        return counted

    def _refusal(self) -> Problem:
        return problem(413, f"the request body is longer than {self._max_bytes} bytes: send smaller batches")
