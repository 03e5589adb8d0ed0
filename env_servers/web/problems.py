"""RFC 9457 problem documents: maps errors to problems and problems to responses.

Invariants
- Every error that a client may get is a problem document. None holds a traceback or repeats the request.
"""

from __future__ import annotations

import http
from collections.abc import Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from env_servers.environment import TaskError, UnknownTask
from env_servers.protocol import Problem
from env_servers.sessions.table import AnchorUnsupported, Busy, Conflict, SessionError, SessionUnknown

MEDIA_TYPE = "application/problem+json"
MAX_DETAIL_CHARS = 500


def problem(status: int, detail: str) -> Problem:
    """A problem document, its detail cut to `MAX_DETAIL_CHARS`."""
    return Problem(title=http.HTTPStatus(status).phrase, status=status, detail=detail[:MAX_DETAIL_CHARS])


def problem_of(error: SessionError | TaskError) -> Problem:
    """The problem document of an error of the session table or of its environment."""
    return problem(_status_of(error), str(error))


def respond(document: Problem, headers: Mapping[str, str] | None = None) -> Response:
    body = document.model_dump_json().encode()
    return Response(body, document.status, headers, MEDIA_TYPE)


def describe(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of a route that may return these problems."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": http.HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in statuses
    }


def handlers() -> dict[int | type[Exception], Callable[[Request, Any], Any]]:
    """Exception handlers that turn every error of an application into a problem document."""
    return {
        SessionError: _on_refusal,
        TaskError: _on_refusal,
        HTTPException: _on_http,
    }


async def _on_refusal(_: Request, error: SessionError | TaskError) -> Response:
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, Busy) else None
    return respond(problem_of(error), headers)


async def _on_http(_: Request, error: HTTPException) -> Response:
    return respond(problem(error.status_code, error.detail), error.headers)


def _status_of(error: SessionError | TaskError) -> int:
    match error:
        case SessionUnknown(ending=None) | UnknownTask():
            return 404
        case SessionUnknown():
            return 410
        case Conflict():
            return 409
        case Busy():
            return 503
        case TaskError() | AnchorUnsupported():
            return 422
        case _:
            return 500
