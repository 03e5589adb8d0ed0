"""What a check found, and what a check is given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import aiohttp

from env_servers.clients.interface import EnvironmentClient
from env_servers.conformance.play import Plan
from env_servers.protocol import EnvInfo

Verdict = Literal["ok", "fail", "note"]
"""`note`: the server is fit, and something about it costs."""


class Unfit(Exception):
    """A check failed. The message says what was seen and where."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    verdict: Verdict
    seen: str


@dataclass(frozen=True)
class Subject:
    """The server under test.

    Attributes:
        client: plays it, one step a request.
        crowd: plays many sessions at once; its steps may travel together, as those of a run do.
        info: what it says of itself.
        http: for requests that no client would send, relative to the server; none where it does not speak the step API.
        plan: which tasks are played, and how far.
    """

    client: EnvironmentClient
    crowd: EnvironmentClient
    info: EnvInfo
    http: aiohttp.ClientSession | None
    plan: Plan


Check = Callable[[Subject], Awaitable[str]]
"""Gives what it saw in words, or raises `Unfit`."""
