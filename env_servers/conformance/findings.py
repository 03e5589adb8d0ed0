"""What a check gets and what it returns."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import aiohttp

from env_servers.clients.interface import EnvironmentClient
from env_servers.conformance.play import Plan
from env_servers.protocol import EnvInfo

Verdict = Literal["ok", "fail", "note"]
"""`note`: the server is fit, but something about it has a cost."""


class Unfit(Exception):
    """A check failed. The message says what was seen, and where."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: name of the check.
        verdict: its outcome.
        seen: what was seen, in one line.
    """

    check: str
    verdict: Verdict
    seen: str


@dataclass(frozen=True)
class Subject:
    """The server under test.

    Attributes:
        client: sends one step a request.
        crowd: plays many sessions at once; its steps may be batched, as in a run.
        info: what the server serves.
        http: sends requests that no client would, relative to the server; none: an OpenEnv server.
        plan: which tasks are played, and how far.
    """

    client: EnvironmentClient
    crowd: EnvironmentClient
    info: EnvInfo
    http: aiohttp.ClientSession | None
    plan: Plan


Check = Callable[[Subject], Awaitable[str]]
"""Returns what it saw, in words, or raises `Unfit`."""
