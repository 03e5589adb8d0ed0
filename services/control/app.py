"""The control plane as an application: the API, its event stream, `/metrics`, and the dashboard's files."""

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
from services.control.access import Gate, Reader, caller
from services.control.actions import Acting
from services.control.headers import Guarded
from services.control.problems import Problem, describe, install
from services.control.requests import ActionRequest
from services.control.routes import REFUSALS, OneRun, router
from services.control.runs import Runs
from services.control.settings import ControlSettings

LOCAL_HOSTS = ["localhost", "127.0.0.1", "[::1]", "::1"]
TITLE = "Anchorage control plane"
DESCRIPTION = (
    "Watches runs from their folders and their Redis, and passes on what people ask of them. "
    "Errors are RFC 9457 problem documents. The dashboard is at `/`."
)


def create_app(settings: ControlSettings) -> FastAPI:
    """The application over the runs in `settings.runs`."""
    runs, acting, registry = Runs(settings.runs), Acting(), CollectorRegistry()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await acting.close()
        runs.close()

    app = FastAPI(title=TITLE, description=DESCRIPTION, version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.runs, app.state.gate, app.state.acting = runs, Gate(settings), acting
    app.state.closing, app.state.streams, app.state.max_streams = asyncio.Event(), 0, settings.max_streams
    app.state.registry = registry
    install(app)
    app.include_router(router)
    _add_actions(app)
    _add_events(app)
    _add_metrics(app)
    _add_pages(app, Path(str(resources.files("services.control") / "static")))
    app.add_middleware(Guarded, registry=registry)
    if settings.open:
        # Nobody may reach an open port through a browser that was told a foreign name for this address.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS, www_redirect=False)
    _describe_problems(app)
    return app


def _add_actions(app: FastAPI) -> None:
    @app.post("/api/v1/runs/{run}/actions", status_code=202, responses=REFUSALS | describe(403, 404, 409, 503))
    async def act(request: Request, run: OneRun, who: Reader, asked: ActionRequest) -> Command:
        """Ask something of the run (admin token): it is carried out between two updates. Follow it among the commands.

        `pause` lets the tickets that are out be played and begins no update; `evaluate` plays the evaluation panel;
        `stop` ends the run after the work in hand, with a checkpoint; `scale` records how many actors are wanted.
        """
        acting: Acting = request.app.state.acting
        return await acting.act(run, who, asked)


async def _one_stream(request: Request) -> AsyncIterator[None]:
    state = request.app.state
    if state.streams >= state.max_streams:
        raise HTTPException(429, "too many event streams are open", {"Retry-After": "10"})
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
        after: Annotated[int, Query(ge=0, le=10**9, description="Leave out the first so many metrics records.")] = 0,
        generation: Annotated[
            int | None,
            Query(ge=0, le=2**53, description="What they are of; where it is another one now, none is left out."),
        ] = None,
    ) -> AsyncIterator[ServerSentEvent]:
        """Server-sent events: `metrics`, `run`, `buffer`, `actors`, `commands`, each now and whenever it changes."""
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
        """Answers while the control plane does; needs no token."""
        return {"status": "ok"}


def _add_pages(app: FastAPI, static: Path) -> None:
    app.mount("/static", StaticFiles(directory=static), name="static")

    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(static / "index.html")


def _describe_problems(app: FastAPI) -> None:
    """Put the problem document's schema where the routes point to."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            document = make()
            document.setdefault("components", {}).setdefault("schemas", {})["Problem"] = Problem.model_json_schema()
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
