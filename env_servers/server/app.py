"""The HTTP application of an environment server: the step API over a session table.

Invariants
- Nothing blocks the event loop: an environment that is `blocking` runs in worker threads.
- Every error is a problem document; the OpenAPI document lists those of each route.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.middleware import Middleware
from starlette.responses import Response

from env_servers.agentgym import routes as agentgym
from env_servers.agentgym.shim import Shim
from env_servers.environment import Environment, TaskError
from env_servers.openenv import routes as openenv
from env_servers.protocol import (
    BatchResetRequest,
    BatchResult,
    BatchStepRequest,
    CloseRequest,
    EnvInfo,
    Problem,
    ResetRequest,
    StepRequest,
    StepResult,
)
from env_servers.server.middleware import Accounting, BodyLimit, CompressedBatches, TokenGuard
from env_servers.server.settings import ServerSettings
from env_servers.sessions.ids import session_prefix
from env_servers.sessions.table import SWEEP_FRACTION, SessionError, SessionTable
from env_servers.sessions.watch import LoopWatch
from env_servers.web.metrics import ServerMetrics
from env_servers.web.problems import describe, handlers, problem_of
from env_servers.web.routing import LeanRoute
from env_servers.workers.affinity import Affinity
from env_servers.workers.link import Links
from env_servers.workers.place import WorkerPlace
from env_servers.workers.sessions import ServerSessions

logger = logging.getLogger(__name__)

API_VERSION = "1.0.0"

ROUTES = ("/health", "/info", "/reset", "/step", "/close", "/batch/reset", "/batch/step", "/metrics")
PROTOCOL_ROUTES = (*openenv.ROUTES, *agentgym.ROUTES)
YIELD_EVERY = 16
"""Items of a batch after which other requests get a turn."""
BODY_PROBLEMS = (408, 413, 415, 422)


class Health(BaseModel):
    """The server is up."""

    status: str = "healthy"


class MetricsPage(Response):
    """Metrics in Prometheus's text format."""

    media_type = CONTENT_TYPE_LATEST


def create_app(environment: type[Environment], settings: ServerSettings, place: WorkerPlace | None = None) -> FastAPI:
    """Create the application that serves `environment`. Its sessions end with the application's lifespan.

    Args:
        environment: the environment class.
        settings: settings of this process; of several processes, `max_sessions` is this one's share.
        place: this process among several; none: there is only one.

    Raises:
        TaskError: the environment cannot offer its tasks.
    """
    worker = None if place is None else place.number
    links = None if place is None else Links(place.number, place.folder, _longest_call(environment, settings))
    table = SessionTable(
        environment,
        max_sessions=settings.max_sessions,
        idle_seconds=settings.idle_seconds,
        threads=settings.threads,
        call_seconds=settings.call_seconds,
        prefix=session_prefix(worker),
    )
    metrics = ServerMetrics(table, (*ROUTES, *PROTOCOL_ROUTES))
    app = FastAPI(
        title=f"Anchorage environment server: {environment.name}",
        version=API_VERSION,
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan_of(table, settings.idle_seconds),
        middleware=_middleware(settings, metrics, links),
        exception_handlers=handlers(),
    )
    app.router.route_class = LeanRoute
    _add_session_routes(app, table, settings)
    sessions = ServerSessions(table, links, settings.max_sessions if place is None else place.all_sessions)
    _add_server_routes(app, sessions.info, metrics, settings)
    openenv.add_openenv_routes(app, environment, sessions, _documented(settings))
    agentgym.add_agentgym_routes(
        app, environment.name, Shim(table, worker), _documented(settings, 404, 409, 410, *BODY_PROBLEMS, routed=True)
    )
    return app


def _longest_call(environment: type[Environment], settings: ServerSettings) -> float:
    """Seconds that a call may take: a blocking environment first waits for a thread, then runs."""
    return 2 * settings.call_seconds if environment.blocking else 0.0


def _add_session_routes(app: FastAPI, table: SessionTable, settings: ServerSettings) -> None:
    each = _in_turn if table.info.batching else _at_once
    lost = (404,) if settings.workers == 1 else (404, 410)  # a session may end with its process

    @app.post("/reset", **_documented(settings, 404, *BODY_PROBLEMS, routed=True))
    async def reset(body: ResetRequest) -> StepResult:
        """Open a session on a task."""
        return await table.reset(body)

    @app.post("/step", **_documented(settings, 404, 409, 410, *BODY_PROBLEMS, routed=True))
    async def step(body: StepRequest) -> StepResult:
        """Take an action. A repeat of the last step returns the same result again."""
        return await table.step(body)

    @app.post("/close", status_code=204, **_documented(settings, *lost, *BODY_PROBLEMS, routed=True))
    async def close(body: CloseRequest) -> None:
        """Close a session."""
        table.close(body.session)

    @app.post("/batch/reset", **_documented(settings, *BODY_PROBLEMS))
    async def batch_reset(body: BatchResetRequest) -> BatchResult:
        """Open several sessions. Each item succeeds or fails on its own."""
        return await each([table.reset(item) for item in body.items])

    @app.post("/batch/step", **_documented(settings, *BODY_PROBLEMS))
    async def batch_step(body: BatchStepRequest) -> BatchResult:
        """Take an action in each of several sessions. Each item succeeds or fails on its own."""
        return await each([table.step(item) for item in body.items])


def _add_server_routes(app: FastAPI, info: EnvInfo, metrics: ServerMetrics, settings: ServerSettings) -> None:
    @app.get("/health")
    async def health() -> Health:
        """Report that the server is up. No token is required."""
        return Health()

    @app.get("/info", **_documented(settings))
    async def describe() -> EnvInfo:
        """Describe what is served."""
        return info

    @app.get("/metrics", response_class=MetricsPage, **_documented(settings))
    async def export() -> MetricsPage:
        """Metrics in Prometheus's text format."""
        return MetricsPage(generate_latest(metrics.registry))


def _documented(settings: ServerSettings, *problems: int, routed: bool = False) -> dict[str, Any]:
    """Route options that add the token and the route's problems to the OpenAPI document.

    Args:
        settings: settings of the server.
        problems: statuses that the route itself may return.
        routed: whether another process may have to handle the request, and may be too slow.
    """
    late = (504,) if routed and settings.workers > 1 else ()
    if settings.token is None:
        return {"responses": describe(*problems, 500, 503, *late)}
    return {
        "responses": describe(401, *problems, 500, 503, *late),
        "dependencies": [Depends(HTTPBearer(auto_error=False))],
    }


def _middleware(settings: ServerSettings, metrics: ServerMetrics, links: Links | None) -> list[Middleware]:
    stack = [Middleware(Accounting, metrics=metrics, max_requests=settings.max_requests)]
    if settings.token is not None:
        stack.append(Middleware(TokenGuard, token=settings.token.get_secret_value()))
    stack += [Middleware(BodyLimit, max_bytes=settings.max_body_bytes), Middleware(CompressedBatches)]
    if links is not None:
        stack.append(Middleware(Affinity, links=links))
    return stack


def _lifespan_of(table: SessionTable, idle_seconds: float) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(table, idle_seconds * SWEEP_FRACTION))
        with LoopWatch(table.on_loop):
            try:
                yield
            finally:
                sweeper.cancel()
                await table.shutdown()

    return lifespan


async def _sweep(table: SessionTable, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        if expired := table.expire():
            logger.info("idle sessions closed: %d", expired)


async def _at_once(calls: Sequence[Coroutine[Any, Any, StepResult]]) -> BatchResult:
    return BatchResult.model_construct(items=await asyncio.gather(*map(_settle, calls)))


async def _in_turn(calls: Sequence[Coroutine[Any, Any, StepResult]]) -> BatchResult:
    """Run fast calls one after the other; every `YIELD_EVERY` of them, other requests get a turn."""
    items = []
    for number, call in enumerate(calls, 1):
        items.append(await _settle(call))
        if number % YIELD_EVERY == 0:
            await asyncio.sleep(0)
    return BatchResult.model_construct(items=items)


async def _settle(call: Coroutine[Any, Any, StepResult]) -> StepResult | Problem:
    try:
        return await call
    except (SessionError, TaskError) as error:
        return problem_of(error)
