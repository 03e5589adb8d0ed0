"""Servers with one fault each, to be found by the check."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from env_servers.environment import Observation
from env_servers.server.app import create_app
from env_servers.server.settings import ServerSettings
from tests.env_servers.counting import TASKS, Counting


class Sound(Counting):
    """Has tasks that can all be played."""

    @classmethod
    def splits(cls) -> Mapping[str, int]:
        return {"train": TASKS}


class Moody(Sound):
    """Says something else every time."""

    def _observe(self, reward: float) -> Observation:
        seen = super()._observe(reward)
        return Observation(seen.text + f" {random.random()}", seen.reward, seen.terminated, admissible=seen.admissible)


class Shared(Sound):
    """All sessions count together."""

    _total = 0

    @property
    def value(self) -> int:
        return Shared._total

    @value.setter
    def value(self, value: int) -> None:
        Shared._total = value


class StateIsChance(Sound):
    """Gives a digest that is another one every time."""

    def _observe(self, reward: float) -> Observation:
        seen = super()._observe(reward)
        return Observation(
            seen.text, seen.reward, seen.terminated, admissible=seen.admissible, state=str(random.random())
        )


class Twisted:
    """The real application with its answers changed: `twist` gets a request's path, its answer's status and body."""

    def __init__(self, twist: Any, **options: Any) -> None:
        self._app: ASGIApp = create_app(Sound, ServerSettings(**{"token": None, "max_sessions": 64, **options}))
        self._twist = twist

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, parts = 0, []

        async def catch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                parts.append(message.get("body", b""))

        await self._app(scope, receive, catch)
        response: Response = self._twist(scope["path"], status, b"".join(parts))
        await response(scope, receive, send)


def as_it_was(status: int, body: bytes) -> Response:
    return Response(body, status, media_type="application/problem+json" if status >= 400 else "application/json")


def crashing(path: str, status: int, body: bytes) -> Response:
    """Every refusal is a 500."""
    return as_it_was(500 if status in (404, 422) and path == "/reset" else status, body)


def mumbling(path: str, status: int, body: bytes) -> Response:
    """Refusals are plain text."""
    return PlainTextResponse("Error", status) if status >= 400 else as_it_was(status, body)


def chatty(path: str, status: int, body: bytes) -> Response:
    """Refusals show the inside."""
    detail = 'Traceback (most recent call last): File "x.py"'
    document = {"title": "Bad", "status": status, "detail": detail}
    refused = JSONResponse(document, status, media_type="application/problem+json")
    return refused if status >= 400 else as_it_was(status, body)


def confused(path: str, status: int, body: bytes) -> Response:
    """What is truncated is called terminated."""
    if path != "/step" or status != 200:
        return as_it_was(status, body)
    answer = json.loads(body)
    if answer["truncated"]:
        answer["terminated"], answer["truncated"] = True, False
    return JSONResponse(answer)


def endless(path: str, status: int, body: bytes) -> Response:
    """A step after the end is answered as if it were taken."""
    if path == "/step" and status == 409 and b"the episode ended" in body:
        answer = {"session": "x", "step": 9, "observation": "", "reward": 0, "terminated": False, "truncated": False}
        return JSONResponse({**answer, "anchor": ""})
    return as_it_was(status, body)


def unanchored(path: str, status: int, body: bytes) -> Response:
    """The anchor is always the same."""
    if path not in ("/reset", "/step") or status != 200:
        return as_it_was(status, body)
    return JSONResponse({**json.loads(body), "anchor": "here"})


def forgetful() -> Any:
    """A repeated step gets another answer."""
    number = itertools.count()

    def twist(path: str, status: int, body: bytes) -> Response:
        if path == "/step" and status == 200:
            body = body.replace(b"The count is", f"{next(number)}: the count is".encode())
        return as_it_was(status, body)

    return twist


def boastful(path: str, status: int, body: bytes) -> Response:
    """Says that it takes 20 sessions, and takes more."""
    if path != "/info":
        return as_it_was(status, body)
    return JSONResponse({**json.loads(body), "max_sessions": 20})


def permissive(path: str, status: int, body: bytes) -> Response:
    """Long actions and batches are taken."""
    return (
        JSONResponse({}, 200) if status in (413, 422) and path in ("/step", "/batch/step") else as_it_was(status, body)
    )
