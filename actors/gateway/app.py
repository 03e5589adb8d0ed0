"""The gateway's HTTP routes: OpenAI's for models, `/episode` for the environment, `/episodes/next` for services.

Invariants
- Every route but `/health` needs a bearer: the key of an episode, or the run's agent token.
- A refusal says whether it may be repeated (`errors.py`). No request ends in a 5xx by what its body holds.
- An answer counts as delivered only when it was written to a connection that was open until then.
- Everything waits within a limit: for a body `BODY_S`, for an answer until the episode ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, Protocol

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from actors.gateway import anthropic, wire
from actors.gateway.calls import Calls, Pending, Policy, body_digest, rules_of
from actors.gateway.errors import Refused
from actors.gateway.keys import Keys
from actors.gateway.service import NextBody, Offer, Offers
from actors.gateway.session import EndBody, FailBody, ObserveBody, Session, StepBody, parsed

logger = logging.getLogger(__name__)

LONGEST_BODY = 8 * 2**20
BODY_S = 30.0
COMMENT_S = 5.0
"""A stream without an answer yet gets a comment this often, so that no proxy and no client gives it up."""
JSON = "application/json"


class Form(Protocol):
    """How a protocol writes answers. A module or an object with these functions."""

    def plain(self, answer: wire.Answer, request: wire.Request) -> dict[str, Any]:
        """The body of a plain response."""

    def opening(self, pending: Pending) -> Iterator[bytes]:
        """The events of a stream that come before there is an answer."""

    def events(self, answer: wire.Answer, request: wire.Request) -> Iterator[bytes]:
        """The other events of a stream."""

    def failure(self, refused: Refused) -> Iterator[bytes]:
        """The events of a stream that ends without an answer."""

    def refusal(self, refused: Refused) -> dict[str, Any]:
        """The body of a refusal."""


class OpenAIForm:
    """OpenAI's chat completions, or text completions."""

    def __init__(self, *, chat: bool) -> None:
        self._chat = chat

    def plain(self, answer: wire.Answer, request: wire.Request) -> dict[str, Any]:
        return wire.chat_response(answer, request) if self._chat else wire.completion_response(answer, request)

    def opening(self, pending: Pending) -> Iterator[bytes]:
        if self._chat:
            yield wire.event(wire.chat_opening(pending.id, pending.created, pending.request.model))

    def events(self, answer: wire.Answer, request: wire.Request) -> Iterator[bytes]:
        events = wire.chat_events if self._chat else wire.completion_events
        for event in events(answer, request):
            yield wire.event(event)
        yield b"data: [DONE]\n\n"

    def failure(self, refused: Refused) -> Iterator[bytes]:
        yield wire.event(refused.body)

    def refusal(self, refused: Refused) -> dict[str, Any]:
        return refused.body


CHAT, COMPLETION, MESSAGES = OpenAIForm(chat=True), OpenAIForm(chat=False), anthropic.MessagesForm()


class Gateway:
    """Serves the episodes of one actor. `app` is its ASGI application.

    Args:
        policy: what model calls need of the actor.
        service_token: of outside services and for metrics; None: both are refused.

    Attributes:
        keys: of the episodes that are being played.
        calls: the model calls.
        offers: of episodes to services.
    """

    def __init__(self, policy: Policy, service_token: str | None = None) -> None:
        self.keys: Keys[Session] = Keys()
        self.calls = Calls(policy)
        self.offers = Offers()
        self._token = service_token
        self._metrics = policy.metrics
        self._vocabulary = policy.vocabulary
        self.app = self._application()

    def _application(self) -> Starlette:
        def post(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
            return Route(path, endpoint, methods=["POST"])

        def get(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
            return Route(path, endpoint, methods=["GET"])

        handlers: dict[Any, Any] = {
            Refused: self._refuse,
            HTTPException: self._refuse_http,
            ClientDisconnect: self._gone,
        }
        return Starlette(
            routes=[
                post("/v1/chat/completions", self._chat),
                post("/v1/completions", self._complete),
                post("/v1/messages", self._messages),
                post("/v1/messages/count_tokens", self._count_tokens),
                get("/v1/models", self._models),
                post("/v1/responses", self._no_responses),
                get("/episode", self._describe),
                post("/episode/step", self._step),
                post("/episode/observe", self._observe),
                post("/episode/end", self._end),
                post("/episode/fail", self._fail),
                post("/episodes/next", self._next),
                get("/health", self._health),
                get("/metrics", self._page),
            ],
            exception_handlers=handlers,
        )

    async def _chat(self, request: Request) -> Response:
        session, body = await self._of_episode(request)
        return self._called(
            session, body, request, CHAT, lambda tree: wire.chat_request(tree, request.headers, rules_of(session))
        )

    async def _complete(self, request: Request) -> Response:
        session, body = await self._of_episode(request)
        return self._called(
            session,
            body,
            request,
            COMPLETION,
            lambda tree: wire.completion_request(tree, request.headers, rules_of(session), self._vocabulary),
        )

    async def _messages(self, request: Request) -> Response:
        session, body = await self._of_episode(request)
        return self._called(
            session,
            body,
            request,
            MESSAGES,
            lambda tree: anthropic.messages_request(tree, request.headers, rules_of(session)),
        )

    async def _count_tokens(self, request: Request) -> Response:
        """The number of tokens that a prompt would have; nothing is recorded."""
        session, body = await self._of_episode(request)
        try:
            asked = anthropic.messages_request(wire.read_json(body), request.headers, rules_of(session))
            count = self.calls.count_tokens(session, asked)
        except Refused as refused:
            session.counts["refused"] += 1
            return self.refusal(refused, MESSAGES.refusal(refused))
        return _json({"input_tokens": count})

    def _called(
        self,
        session: Session,
        body: bytes,
        request: Request,
        form: Form,
        read: Callable[[Mapping[str, Any]], wire.Request],
    ) -> Response:
        """The response to a model call: a new one, or an earlier one that this is a retry of."""
        digest = body_digest(request.url.path, body)
        try:
            session.require_open()
            pending = self.calls.find(session, digest, request.headers)
            if pending is None:
                pending = self.calls.begin(session, read(wire.read_json(body)), digest, request.headers)
        except Refused as refused:
            session.counts["refused"] += 1
            return self.refusal(refused, form.refusal(refused))
        return _CallResponse(self, session, pending, form)

    async def _models(self, request: Request) -> Response:
        await self._of_episode(request)
        models = [
            {"id": name, "object": "model", "created": 0, "owned_by": "anchorage"}
            for name in ("policy", f"policy{wire.FROZEN}")
        ]
        return _json({"object": "list", "data": models})

    async def _no_responses(self, request: Request) -> Response:
        await self._of_episode(request)
        raise Refused(
            404,
            "unsupported_route",
            "the Responses API is not supported: use chat completions, in the OpenAI Agents SDK by "
            'set_default_openai_api("chat_completions")',
        )

    async def _describe(self, request: Request) -> Response:
        session, _ = await self._of_episode(request)
        return _json(session.describe())

    async def _step(self, request: Request) -> Response:
        session, body = await self._of_episode(request)
        return _json(await session.step(parsed(StepBody, wire.read_json(body))))

    async def _observe(self, request: Request) -> Response:
        session, body = await self._of_episode(request)
        return _json(session.observe(parsed(ObserveBody, wire.read_json(body))))

    async def _end(self, request: Request) -> Response:
        session, body = await self._of_episode(request)
        session.end(parsed(EndBody, wire.read_json(body)))
        return Response(status_code=204)

    async def _fail(self, request: Request) -> Response:
        session, body = await self._of_episode(request)
        session.fail(parsed(FailBody, wire.read_json(body)))
        return Response(status_code=204)

    async def _next(self, request: Request) -> Response:
        self._require_token(request)
        body = parsed(NextBody, wire.read_json(await _body(request) or b"{}"))
        return _NextResponse(self.offers, body.wait_s)

    async def _health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def _page(self, request: Request) -> Response:
        self._require_token(request)
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4")

    async def _of_episode(self, request: Request) -> tuple[Session, bytes]:
        """The episode of a request's key, and its body. Raises Refused."""
        session = self.keys.find(_bearer(request))
        session.touch()
        return session, await _body(request)

    def _require_token(self, request: Request) -> None:
        if self._token is None:
            raise Refused(
                401,
                "invalid_api_key",
                "this route needs the run's agent token: start the run with ANCHORAGE_AGENT_TOKEN",
            )
        given = _bearer(request) or ""
        if not hmac.compare_digest(given.encode(errors="replace"), self._token.encode()):
            raise Refused(401, "invalid_api_key", "missing or invalid agent token (ANCHORAGE_AGENT_TOKEN of the run)")

    async def _refuse(self, request: Request, refused: Refused) -> Response:
        return self.refusal(refused, refused.body)

    async def _refuse_http(self, request: Request, error: HTTPException) -> Response:
        return self.refusal(Refused(404, "unknown_route", f"no route {request.method} {request.url.path[:80]}"))

    async def _gone(self, request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)

    def refusal(self, refused: Refused, body: Mapping[str, Any] | None = None) -> Response:
        """The response that refuses a request; counts it."""
        self._metrics.refused.labels(refused.code).inc()
        self._metrics.calls.labels(str(refused.status)).inc()
        return _json(body or refused.body, refused.status, refused.headers)

    def delivered(self, session: Session, pending: Pending) -> None:
        """Note that a client has an answer."""
        session.record.deliver(pending.call.number)
        session.touch()
        self._metrics.calls.labels("200").inc()


class _Watched(Response):
    """A response that knows whether its client is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.gone = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.create_task(self._watch(receive))
        try:
            await self.respond(scope, receive, send)
        finally:
            watching.cancel()

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    async def is_gone(self) -> bool:
        """Whether the client has left, as far as the kernel has told by now."""
        await asyncio.sleep(0)
        return self.gone.is_set()

    async def _watch(self, receive: Receive) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone.set()


class _CallResponse(_Watched):
    """The response to a model call, plain or streamed."""

    def __init__(self, gateway: Gateway, session: Session, pending: Pending, form: Form) -> None:
        super().__init__()
        self._gateway = gateway
        self._session = session
        self._pending = pending
        self._form = form
        self._extra = {"x-anchorage-call": str(pending.call.number), "x-anchorage-turn": str(pending.call.state)}
        if pending.request.imposed:
            self._extra["x-anchorage-imposed"] = ",".join(pending.request.imposed)

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._pending.request.stream:
            await self._stream(send)
            return
        pending = self._pending
        try:
            answer = await pending.answer(self.gone)
        except Refused as refused:
            response = self._gateway.refusal(refused, self._form.refusal(refused))
            await response(scope, receive, send)
            return
        if answer is None or await self.is_gone():
            return
        if not pending.body:
            pending.body = orjson.dumps(self._form.plain(answer, pending.request))
        await _json_bytes(pending.body, self._extra | _version(pending))(scope, receive, send)
        self._gateway.delivered(self._session, pending)

    async def _stream(self, send: Send) -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", **self._extra}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})

        async def write(event: bytes, *, last: bool = False) -> None:
            await send({"type": "http.response.body", "body": event, "more_body": not last})

        for event in self._form.opening(self._pending):
            await write(event)
        try:
            async for answer in self._answers(write):
                for event in self._form.events(answer, self._pending.request):
                    await write(event)
                if not await self.is_gone():
                    await write(b"", last=True)
                    self._gateway.delivered(self._session, self._pending)
        except Refused as refused:
            self._gateway.refusal(refused)
            for event in self._form.failure(refused):
                await write(event)
            await write(b"", last=True)

    async def _answers(self, write: Callable[[bytes], Awaitable[None]]) -> AsyncIterator[wire.Answer]:
        """The answer, or nothing if the client leaves before; writes a comment now and then."""
        waiting = asyncio.create_task(self._pending.answer(self.gone))
        try:
            while not (await asyncio.wait([waiting], timeout=COMMENT_S))[0]:
                await write(b": sampling\n\n")
            answer = waiting.result()
            if answer is not None:
                yield answer
        finally:
            waiting.cancel()


class _NextResponse(_Watched):
    """The response to `POST /episodes/next`."""

    def __init__(self, offers: Offers, wait_s: float) -> None:
        super().__init__()
        self._offers = offers
        self._wait_s = wait_s

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        offer: Offer | None = await self._offers.next(self._wait_s, self.gone)
        if offer is None:
            await Response(status_code=204)(scope, receive, send)
            return
        if await self.is_gone():
            self._offers.refused(offer)
            return
        await _json(offer.episode)(scope, receive, send)
        self._offers.told(offer)


def _version(pending: Pending) -> dict[str, str]:
    sample = pending.call.sample
    return {"x-anchorage-version": str(sample.versions[-1].version)} if sample and sample.versions else {}


def _bearer(request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return request.headers.get("x-api-key")


async def _body(request: Request) -> bytes:
    """The body of a request, within the limits of length and time. Raises Refused."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > LONGEST_BODY:
        raise _too_long()
    parts, length = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                parts.append(part)
                length += len(part)
                if length > LONGEST_BODY:
                    raise _too_long()
    except TimeoutError:
        raise Refused(400, "incomplete_body", f"the body did not arrive within {BODY_S:g} s") from None
    return b"".join(parts)


def _too_long() -> Refused:
    return Refused(413, "body_too_long", f"the body is longer than {LONGEST_BODY} bytes: shorten the conversation")


def _json(data: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(data), status, dict(headers or {}), JSON)


def _json_bytes(body: bytes, headers: Mapping[str, str]) -> Response:
    return Response(body, 200, dict(headers), JSON)
