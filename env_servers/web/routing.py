"""A FastAPI route with FastAPI's documentation and a shorter request path.

On every request FastAPI itself resolves dependencies and validates the response again. Routes here have at most one
JSON body or query and return one model, so both reduce to one call into pydantic.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from env_servers.errors import summary

JSON = "application/json"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class LeanRoute(APIRoute):
    """Route of an `async` endpoint with at most one parameter, which returns a model.

    The parameter is the model of the body (POST) or of the query (GET), or the `Request` itself. An endpoint may also
    return a `Response`, which is sent unchanged, or None, which sends no body.
    """

    def get_route_handler(self) -> Handler:
        hints = get_type_hints(self.endpoint)
        answer = _writer(hints.pop("return"), self.status_code or 200)
        if not hints:
            return _without_body(self.endpoint, answer)
        (given,) = hints.values()
        if given is Request:
            return _with_request(self.endpoint, answer)
        if "GET" in self.methods:
            return _with_query(self.endpoint, TypeAdapter(given), answer)
        return _with_body(self.endpoint, TypeAdapter(given), answer)


def _writer(model: Any, status: int) -> Callable[[Any], Response]:
    if model is type(None):
        return lambda _: Response(status_code=status)
    if isinstance(model, type) and issubclass(model, Response):
        return lambda response: response
    dump = TypeAdapter(model).dump_json
    return lambda answer: Response(dump(answer), status, media_type=JSON)


def _without_body(endpoint: Callable[..., Any], answer: Callable[[Any], Response]) -> Handler:
    async def handle(_: Request) -> Response:
        return answer(await endpoint())

    return handle


def _with_request(endpoint: Callable[..., Any], answer: Callable[[Any], Response]) -> Handler:
    async def handle(request: Request) -> Response:
        return answer(await endpoint(request))

    return handle


def _with_query(endpoint: Callable[..., Any], model: TypeAdapter[Any], answer: Callable[[Any], Response]) -> Handler:
    async def handle(request: Request) -> Response:
        try:
            given = model.validate_strings(dict(request.query_params))
        except ValidationError as error:
            raise HTTPException(422, summary(error)) from error
        return answer(await endpoint(given))

    return handle


def _with_body(endpoint: Callable[..., Any], model: TypeAdapter[Any], answer: Callable[[Any], Response]) -> Handler:
    async def handle(request: Request) -> Response:
        media_type = request.headers.get("content-type", "")
        if media_type.partition(";")[0].strip().lower() != JSON:
            raise HTTPException(415, f"the body's content type must be {JSON}")
        try:
            given = model.validate_json(await request.body())
        except ValidationError as error:
            raise HTTPException(422, summary(error)) from error
        return answer(await endpoint(given))

    return handle
