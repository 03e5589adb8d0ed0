"""RFC 9457 problem documents, for every error of the API.

Invariants
- No document holds a traceback, a path outside the runs' folder, or a secret.
"""

from __future__ import annotations

import http
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from services.archive import ArchiveDamaged
from services.errors import BufferDamaged, RedisUnavailable

MEDIA_TYPE = "application/problem+json"
MAX_DETAIL_CHARS = 500

log = logging.getLogger(__name__)


class Problem(BaseModel):
    """An RFC 9457 problem document."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


def describe(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of a route that may return these problems."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": http.HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in statuses
    }


def respond(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A problem document as a response."""
    document = Problem(title=http.HTTPStatus(status).phrase, status=status, detail=detail[:MAX_DETAIL_CHARS])
    return JSONResponse(document.model_dump(), status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Let `app` return every error as a problem document."""
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(RedisUnavailable, _on_redis)
    app.add_exception_handler(ArchiveDamaged, _on_damage)
    app.add_exception_handler(Exception, _on_unexpected)


async def _on_http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return respond(error.status_code, str(error.detail), error.headers)


async def _on_invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return respond(422, f"{where}: {first['msg']}")


async def _on_redis(_: Request, error: Exception) -> JSONResponse:
    log.warning("%s", error)
    damaged = isinstance(error, BufferDamaged)
    return respond(409, str(error) if damaged else "the run is not live: its Redis does not respond")


async def _on_damage(_: Request, error: Exception) -> JSONResponse:
    log.warning("%s", error)
    return respond(410, str(error))


async def _on_unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("unexpected error in %s %s", request.method, request.url.path, exc_info=error)
    return respond(500, "unexpected error: see the control plane's log")
