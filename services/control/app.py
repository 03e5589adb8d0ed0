"""The application of the control plane: API, event stream, `/metrics` and the dashboard's files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.middleware.trustedhost import TrustedHostMiddleware

from services.buffer.commands import Command
from services.control import events, exporter
from services.control.access import Authenticator, Reader, caller
from services.control.actions import Actions
from services.control.comparison import Compare
from services.control.headers import SecurityHeaders
from services.control.problems import Problem, describe, install
from services.control.requests import ActionRequest
from services.control.routes import REFUSALS, OneRun, router
from services.control.runs import Runs
from services.control.settings import ControlSettings

LOCAL_HOSTS = ["localhost", "127.0.0.1", "[::1]", "::1"]
TITLE = "Anchorage control plane"
DESCRIPTION = (
    "Shows runs from their folders and their Redis, and passes actions to them. "
    "Errors are RFC 9457 problem documents. The dashboard is at `/`."
)


def create_app(settings: ControlSettings, compare: Compare | None = None) -> FastAPI:
    """Create the application over the runs in `settings.runs`. `compare`: the learner's estimators; None: without."""
    runs, actions, registry = Runs(settings.runs), Actions(), CollectorRegistry()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await actions.close()
        runs.close()

    app = FastAPI(title=TITLE, description=DESCRIPTION, version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.runs, app.state.authenticator, app.state.actions = runs, Authenticator(settings), actions
    app.state.closing, app.state.streams, app.state.max_streams = asyncio.Event(), 0, settings.max_streams
    app.state.registry, app.state.compare = registry, compare
    install(app)
    app.include_router(router)
    _add_actions(app)
    _add_events(app)
    _add_metrics(app)
    _add_pages(app, Path(str(resources.files("services.control") / "static")))
    app.add_middleware(SecurityHeaders, registry=registry)
    if settings.open:
        # Prevents DNS rebinding: a web page whose host name resolves to this address must not reach an open port.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS, www_redirect=False)
    _describe_problems(app)
    return app


def _add_actions(app: FastAPI) -> None:
    @app.post("/api/v1/runs/{run}/actions", status_code=202, responses=REFUSALS | describe(403, 404, 409, 503))
    async def act(request: Request, run: OneRun, who: Reader, asked: ActionRequest) -> Command:
        """Request an action of the run (admin token). It is executed between two updates; `commands` has its result.

        `pause` finishes the issued tickets and starts no further update; `evaluate` plays the evaluation panel; `stop`
        finishes the current update, writes a checkpoint and ends the run; `scale` sets the requested number of actors.
        """
        actions: Actions = request.app.state.actions
        return await actions.act(run, who, asked)


async def _one_stream(request: Request) -> AsyncIterator[None]:
    state = request.app.state
    if state.streams >= state.max_streams:
        raise HTTPException(
            429, f"the limit of {state.max_streams} event streams is reached: retry later", {"Retry-After": "10"}
        )
    state.streams += 1
    try:
        yield
    finally:
        state.streams -= 1


def _add_events(app: FastAPI) -> None:
    @app.get(
        "/api/v1/runs/{run}/events",
        response_class=EventSourceResponse,
        dependencies=[Depends(caller), Depends(_one_stream)],
        responses=REFUSALS | describe(404),
    )
    async def stream(
        request: Request,
        run: OneRun,
        after: Annotated[int, Query(ge=0, le=10**9, description="Number of metrics records to skip.")] = 0,
        generation: Annotated[
            int | None,
            Query(ge=0, le=2**53, description="Generation of those records; if it has changed, none is skipped."),
        ] = None,
    ) -> AsyncIterator[ServerSentEvent]:
        """Server-sent events `metrics`, `run`, `buffer`, `actors`, `commands`, `warnings`: now and at every change."""
        runs: Runs = request.app.state.runs
        async for event in events.stream(lambda: runs.find(run.name), after, generation, request.app.state.closing):
            yield event


def _add_metrics(app: FastAPI) -> None:
    @app.get(
        "/metrics",
        dependencies=[Depends(caller)],
        response_class=Response,
        responses=REFUSALS | {200: {"description": "OK", "content": {CONTENT_TYPE_LATEST: {}}}},
    )
    def prometheus(request: Request) -> Response:
        """Prometheus metrics of all live runs and of the control plane."""
        text = exporter.page(request.app.state.runs.all()) + generate_latest(request.app.state.registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Report that the control plane is up. No token is required."""
        return {"status": "ok"}


def _add_pages(app: FastAPI, static: Path) -> None:
    app.mount("/static", StaticFiles(directory=static), name="static")

    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(static / "index.html")


def _describe_problems(app: FastAPI) -> None:
    """Add the schema of the problem document, which the routes refer to."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            document = make()
            document.setdefault("components", {}).setdefault("schemas", {})["Problem"] = Problem.model_json_schema()
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
