"""Routes each request to the process that holds its session, and new sessions to the processes in turn.

Invariants
- The client sees one server: the response does not depend on the process that it is connected to.
- A step of a session whose process has ended gets 410; nothing else is lost with the process.
- A batch is split, each part is handled by its process, and the results are put together in order. A reset of a batch
  is refused only if every process refuses it.

Example, a server of the processes 1, 2 and 3, and a client that is connected to process 2::

    POST /step {"session": "3.kV9…"}   process 2 reads the 3 of the id and calls process 3
    POST /step {"session": "7.aB1…"}   there is no process 7 (any more): 410
    POST /reset                        processes in turn: 2, or if it is full 3, or 1; 503 if all are full
    POST /batch/reset of 5 items       see `Affinity._batch_reset`
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import orjson
from pydantic import BaseModel, ValidationError
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from env_servers.agentgym.routes import PREFIX as AGENTGYM
from env_servers.protocol import BatchResetRequest, BatchStepRequest
from env_servers.sessions.ids import worker_of_number, worker_of_session
from env_servers.web.metrics import merge
from env_servers.web.problems import MEDIA_TYPE, problem
from env_servers.workers.link import (
    GONE,
    NONE_LEFT,
    SILENT,
    Answer,
    Call,
    Links,
    WorkerGone,
    WorkerSilent,
    call_app,
)

Handler = Callable[[Call], Awaitable[Answer]]

_ELSEWHERE = (410, 503)
"""Statuses of a reset that another process may accept: the process has ended (410) or is full (503)."""


class Affinity:
    """ASGI middleware of a server of several processes. The last one before the routes."""

    def __init__(self, app: ASGIApp, links: Links) -> None:
        self._app = app
        self._links = links
        self._turn = itertools.count(links.worker)
        by_number: Handler = self._by_number
        self._handlers: dict[tuple[str, str], Handler] = {
            ("POST", "/step"): self._by_session,
            ("POST", "/close"): self._by_session,
            ("POST", "/reset"): self._place,
            ("POST", "/batch/reset"): self._batch_reset,
            ("POST", "/batch/step"): self._batch_step,
            ("GET", "/metrics"): self._metrics,
            ("POST", f"{AGENTGYM}/create"): self._place,
            ("POST", f"{AGENTGYM}/reset"): by_number,
            ("POST", f"{AGENTGYM}/step"): by_number,
            ("POST", f"{AGENTGYM}/close"): by_number,
            ("GET", f"{AGENTGYM}/observation"): by_number,
            ("GET", f"{AGENTGYM}/available_actions"): by_number,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._run_lifespan(scope, receive, send)
            return
        handler = self._handlers.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if handler is None or not _is_json(scope):
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return
        answer = await handler(Call(scope["method"], scope["path"], scope["query_string"].decode("latin-1"), body))
        headers = {name: value for name, value in answer.headers if name != "content-length"}
        await Response(answer.body, answer.status, headers)(scope, receive, send)

    async def _run_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application's lifespan, with the links up meanwhile."""

        async def watch(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self._links.start(self._app)
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            await self._links.stop()

    async def _by_session(self, call: Call) -> Answer:
        """Route by the session id in the body."""
        document = _object(call.body)
        session = document.get("session")
        return await self._at(worker_of_session(session) if isinstance(session, str) else None, call)

    async def _by_number(self, call: Call) -> Answer:
        """Route by AgentGym's number of the environment, in the body or the query."""
        given = _object(call.body) if call.method == "POST" else _query(call.query)
        numbers = [given[name] for name in ("id", "env_idx") if name in given]
        number = numbers[0] if numbers and isinstance(numbers[0], int) else 0
        return await self._at(worker_of_number(number) if 0 <= number < 1 << 63 else None, call)

    async def _place(self, call: Call) -> Answer:
        """Open a session at the first process in turn that has room."""
        answer = _refusal(503, NONE_LEFT)
        for worker in self._in_turn():
            try:
                answer = await self._ask(worker, call)
            except WorkerGone:
                continue
            except WorkerSilent:
                return _refusal(504, "the worker process did not answer in time: retry later")
            if answer.status != 503:
                break
        return answer

    async def _batch_reset(self, call: Call) -> Answer:
        """Spread the resets of a batch over the processes; what one refuses goes to the next.

        Example: 5 items, processes in turn 2, 3, 1, where process 3 is full and process 1 has one free slot. In round
        `turn`, the item at `place` goes to `workers[(place + turn) % 3]`::

            place         0     1     2     3     4
            round 0 to    2     3     1     2     3      1 and 4 are refused (503)
            round 1 to          1                 1      refused: its only slot went to place 2
            round 2 to          2                 2      opened
            process       2     2     1     2     2

        All items of a round are sent at once, one request a process. An item that every process refused is a 503.
        """
        items = _items(BatchResetRequest, call.body)
        if items is None:
            return await call_app(self._app, call)
        workers = self._in_turn()
        results: list[Any] = [None] * len(items)
        waiting = list(range(len(items)))
        for turn in range(len(workers)):
            places = {place: workers[(place + turn) % len(workers)] for place in waiting}
            answers = await self._split(call, [items[place] for place in places], list(places.values()))
            for place, answer in zip(places, answers, strict=True):
                results[place] = answer
            waiting = [place for place in places if results[place].get("status") in _ELSEWHERE]
            if not waiting:
                break
        for place in waiting:
            results[place] = problem(503, NONE_LEFT).model_dump()
        return _batch(results)

    async def _batch_step(self, call: Call) -> Answer:
        """Take each step at the process that its session id names."""
        items = _items(BatchStepRequest, call.body)
        if items is None:
            return await call_app(self._app, call)
        here = self._links.worker
        return _batch(await self._split(call, items, [worker_of_session(item["session"]) or here for item in items]))

    async def _split(self, call: Call, items: list[dict[str, Any]], workers: list[int]) -> list[Any]:
        """Send each item to the process at the same place in `workers`, one request a process; results in order.

        Example: items a b c d for the workers 1 2 1 3 are the three batches [a c], [b] and [d].
        """
        parts: defaultdict[int, list[int]] = defaultdict(list)
        for place, worker in enumerate(workers):
            parts[worker].append(place)
        calls = (
            self._at(worker, Call("POST", call.path, "", orjson.dumps({"items": [items[place] for place in places]})))
            for worker, places in parts.items()
        )
        results: list[Any] = [None] * len(items)
        for places, answer in zip(parts.values(), await asyncio.gather(*calls), strict=True):
            document = orjson.loads(answer.body)
            found = document["items"] if answer.status == 200 else [document] * len(places)
            for place, result in zip(places, found, strict=True):
                results[place] = result
        return results

    async def _metrics(self, call: Call) -> Answer:
        """The metrics of all processes, added up."""
        answers = await asyncio.gather(
            *(self._ask(worker, call) for worker in self._links.workers()), return_exceptions=True
        )
        pages = [answer for answer in answers if isinstance(answer, Answer) and answer.status == 200]
        if not pages:
            return await call_app(self._app, call)
        return Answer(200, pages[0].headers, merge([page.body.decode() for page in pages]))

    async def _at(self, worker: int | None, call: Call) -> Answer:
        """The response of the process that holds the session; 410 or 504 if there is none."""
        try:
            return await self._ask(worker or self._links.worker, call)
        except WorkerGone:
            return _refusal(410, GONE)
        except WorkerSilent:
            return _refusal(504, SILENT)

    async def _ask(self, worker: int, call: Call) -> Answer:
        if worker == self._links.worker:
            return await call_app(self._app, call)
        return await self._links.call(worker, call)

    def _in_turn(self) -> list[int]:
        workers = self._links.workers() or [self._links.worker]
        first = next(self._turn) % len(workers)
        return workers[first:] + workers[:first]


def _is_json(scope: Scope) -> bool:
    """Whether the body is JSON. Only such calls are passed on; others are refused by the routes of this process."""
    if scope["method"] == "GET" or scope["path"] == f"{AGENTGYM}/create":
        return True
    for name, value in scope["headers"]:
        if name == b"content-type":
            return bool(value.partition(b";")[0].strip().lower() == b"application/json")
    return False


async def _read(receive: Receive) -> bytes | None:
    """The complete body; None if the client disconnected."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _query(query: str) -> dict[str, Any]:
    given = {name: values[-1] for name, values in parse_qs(query).items()}
    return {
        name: int(value) for name, value in given.items() if value.isascii() and value.isdecimal() and len(value) < 20
    }


def _items(model: type[BaseModel], body: bytes) -> list[dict[str, Any]] | None:
    """The items of a valid batch; None for an invalid one, which the routes refuse as a whole."""
    try:
        model.model_validate_json(body)
        items: list[dict[str, Any]] = orjson.loads(body)["items"]
    except (ValidationError, orjson.JSONDecodeError):
        return None
    return items


def _batch(results: list[Any]) -> Answer:
    return Answer(200, [("content-type", "application/json")], orjson.dumps({"items": results}))


def _refusal(status: int, detail: str) -> Answer:
    headers = [("content-type", MEDIA_TYPE)]
    if status in (503, 504):
        headers.append(("retry-after", "1"))
    return Answer(status, headers, problem(status, detail).model_dump_json().encode())
