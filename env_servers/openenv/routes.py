"""OpenEnv's HTTP routes beside the step API: metadata, schemas, and an empty list of tools.

`POST /reset` and `POST /step` belong to the step API: OpenEnv's clients play over `/ws`.
"""

from __future__ import annotations

import inspect
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic_core import from_json, to_json
from starlette.requests import Request
from starlette.responses import Response

from env_servers.environment import Environment
from env_servers.openenv.endpoint import socket_endpoint
from env_servers.openenv.wire import State, TextAction, TextObservation, json_rpc
from env_servers.workers.sessions import ServerSessions

ROUTES = ("/metadata", "/schema", "/state", "/mcp", "/ws")

JSON_RPC_BODY: dict[str, Any] = {"requestBody": {"content": {"application/json": {"schema": {}}}}}


class Metadata(BaseModel):
    """What is served, in OpenEnv's terms."""

    name: str
    description: str
    version: str


class Schemas(BaseModel):
    """JSON schemas of the messages of `/ws`."""

    action: dict[str, Any]
    observation: dict[str, Any]
    reset_observation: dict[str, Any]
    state: dict[str, Any]


def add_openenv_routes(
    app: FastAPI, environment: type[Environment], sessions: ServerSessions, documented: dict[str, Any]
) -> None:
    """Add OpenEnv's routes.

    Args:
        app: the application.
        environment: the environment class that is served.
        sessions: the server's sessions.
        documented: route options for the OpenAPI document.
    """
    observation = TextObservation.model_json_schema()
    schemas = Schemas(
        action=TextAction.model_json_schema(),
        observation=observation,
        reset_observation=observation,
        state=State.model_json_schema(),
    )
    metadata = Metadata(
        name=environment.name,
        description=(inspect.getdoc(environment) or environment.name).partition("\n")[0],
        version=environment.version,
    )

    @app.get("/metadata", **documented)
    async def describe() -> Metadata:
        """OpenEnv: describe what is served."""
        return metadata

    @app.get("/schema", **documented)
    async def show_schemas() -> Schemas:
        """OpenEnv: JSON schemas of actions, observations and states."""
        return schemas

    @app.get("/state", **documented)
    async def show_state() -> State:
        """OpenEnv: the state of a client without a WebSocket, which is always empty. Use `/ws`."""
        return State()

    @app.post("/mcp", openapi_extra=JSON_RPC_BODY, **documented)
    async def call_tool(request: Request) -> Response:
        """OpenEnv: JSON-RPC of the Model Context Protocol. There are no tools."""
        return Response(to_json(json_rpc(_object_of(await request.body()))), media_type="application/json")

    app.router.add_websocket_route("/ws", socket_endpoint(sessions))


def _object_of(body: bytes) -> dict[str, Any] | None:
    """The body's JSON object; an empty one for other JSON; None for invalid JSON."""
    try:
        found = from_json(body)
    except ValueError:
        return None
    return found if isinstance(found, dict) else {}
