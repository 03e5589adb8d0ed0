"""The interface of every client of an environment, and the errors that it raises."""

from __future__ import annotations

from typing import Protocol

from env_servers.protocol import EnvInfo, ResetRequest, StepResult


class EnvironmentUnavailableError(Exception):
    """The server is unreachable, busy or no environment server, after bounded retries."""


class SessionLost(Exception):
    """The server does not know the session (any more): restart the episode from reset."""


class RequestRejected(Exception):
    """The server refused the request or failed at it, and a retry would not help. The message says why."""


class EnvironmentFailed(RequestRejected):
    """The environment failed at the request (HTTP 500, or an invalid result). The action may be the cause."""


class WrongAnswer(RequestRejected):
    """The server accepted the request and returned the state of another step or session."""


class ActionRefused(RequestRejected):
    """The server refused this action; the session is unchanged. The message says what is wrong with the action.

    Clients turn it into a transition (`refusals.py`). Callers see the error only for sessions that they did not open.
    """


class EnvironmentClient(Protocol):
    """Plays episodes.

    `reset` and `step` raise `EnvironmentUnavailableError`, `SessionLost` and `RequestRejected`.
    """

    async def info(self) -> EnvInfo: ...
    async def reset(self, request: ResetRequest) -> StepResult: ...
    async def step(self, session: str, step: int, action: str) -> StepResult: ...
    async def close_session(self, session: str) -> None: ...
    async def close(self) -> None: ...
