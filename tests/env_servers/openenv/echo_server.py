"""Runs under a real OpenEnv: an echo environment, as its authors publish one, at `--port`.

`tools`: the environment offers the tool `echo_message`, as OpenEnv's `echo_env` does since it became one of tools.
`plain`: an action with the field `message` is echoed, as `echo_env` did before.
"""

from __future__ import annotations

import argparse
import socket
from pathlib import Path
from typing import Any

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State


class EchoAction(Action):
    message: str


class EchoObservation(Observation):
    echoed_message: str
    message_length: int = 0


class PlainEcho(Environment):
    """Says what it hears. `bye` ends the episode."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._state = State(step_count=0)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> EchoObservation:
        self._state = State(episode_id=episode_id, step_count=0)
        return EchoObservation(echoed_message=f"ready {seed}", reward=0.0)

    def step(self, action: EchoAction, timeout_s: float | None = None, **_: Any) -> EchoObservation:
        self._state.step_count += 1
        heard = action.message
        return EchoObservation(echoed_message=heard, message_length=len(heard), reward=0.5, done=heard == "bye")

    @property
    def state(self) -> State:
        return self._state


class ToolEcho(MCPEnvironment):
    """Offers its echo as a tool."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        server = FastMCP("echo_env")

        @server.tool
        def echo_message(message: str) -> str:
            """Say the message again."""
            return message

        @server.tool
        def echo_with_length(message: str, times: int) -> dict[str, Any]:
            """Say the message several times."""
            return {"message": message * times, "length": len(message) * times}

        super().__init__(server)
        self._state = State(step_count=0)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Observation:
        self._state = State(episode_id=episode_id, step_count=0)
        return Observation(reward=0.0, metadata={"status": "ready"})

    def _step_impl(self, action: Action, timeout_s: float | None = None, **_: Any) -> Observation:
        return Observation(metadata={"error": f"no tool: {type(action).__name__}"})

    async def step_async(self, action: Action, timeout_s: float | None = None, **more: Any) -> Observation:
        self._state.step_count += 1
        return await super().step_async(action, timeout_s=timeout_s, **more)

    @property
    def state(self) -> State:
        return self._state


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["plain", "tools"])
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--sessions", type=int, default=256)
    options = parser.parse_args()
    most = options.sessions
    if options.kind == "plain":
        app = create_app(PlainEcho, EchoAction, EchoObservation, env_name="echo", max_concurrent_envs=most)
    else:
        app = create_app(ToolEcho, CallToolAction, CallToolObservation, env_name="echo", max_concurrent_envs=most)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    # Renamed into place: whoever waits for the file never reads half of it.
    written = options.ready_file.with_suffix(".new")
    written.write_text(f"http://127.0.0.1:{listener.getsockname()[1]}")
    written.replace(options.ready_file)
    uvicorn.Server(uvicorn.Config(app, log_level="critical")).run([listener])


if __name__ == "__main__":
    main()
