"""All checks of one server, in order, each bounded in time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import aiohttp
from pydantic import ValidationError

from env_servers.client import OPENENV_PREFIX, HttpClient, OpenEnvClient, open_client
from env_servers.clients.interface import (
    EnvironmentClient,
    EnvironmentUnavailableError,
    RequestRejected,
    SessionLost,
    one_line,
)
from env_servers.conformance import api_checks as asking
from env_servers.conformance import notes
from env_servers.conformance import play_checks as playing
from env_servers.conformance.findings import Check, Finding, Subject, Unfit
from env_servers.conformance.play import Plan, sample_tasks
from env_servers.conformance.speed import speed
from env_servers.protocol import EnvInfo

PATIENCE_S = 5.0
EXAMPLES = 64

Look = Callable[[Subject], Awaitable[Finding]]


@dataclass(frozen=True)
class Options:
    """How thoroughly a server is checked.

    Attributes:
        tasks, steps: how many tasks are played, and how many actions of each.
        sessions, seconds: of the measurement of speed.
        least_steps_per_s: below this rate the server is not fit.
        timeout_s: longest answer. check_limit_s: longest check.
        actions: tried where the server does not say what it accepts; empty: what its schemas suggest, or common ones.
    """

    tasks: int = 8
    steps: int = 20
    sessions: int = 32
    seconds: float = 5.0
    least_steps_per_s: float = 0.0
    timeout_s: float = 30.0
    check_limit_s: float = 300.0
    actions: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """What all checks found."""

    url: str
    info: EnvInfo
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...] = ()
    """What is no condition of fitness."""

    @property
    def fit(self) -> bool:
        return all(finding.verdict != "fail" for finding in self.findings)


async def check_server(
    url: str, token: str | None = None, options: Options = Options(), tell: Callable[[Finding], None] = lambda _: None
) -> Report:
    """Check the server at `url`, which may begin with `openenv+`. `tell` is called after each check.

    Raises:
        EnvironmentUnavailableError: there is no server to check. RequestRejected: it refuses to say what it serves.
        ValueError: `url` is no address.
    """
    async with AsyncExitStack() as stack:
        crowd = client = open_client(url, token=token, timeout_s=options.timeout_s, patience_s=PATIENCE_S)
        stack.push_async_callback(crowd.close)
        if isinstance(crowd, HttpClient):
            client = HttpClient(url, token=token, timeout_s=options.timeout_s, patience_s=PATIENCE_S, coalesce=False)
            stack.push_async_callback(client.close)
        info = await client.info()
        tasks = sample_tasks(info, options.tasks)
        if not tasks:
            raise EnvironmentUnavailableError(f"the server at {url} serves no tasks")
        plan = Plan(tasks, options.steps, tuple(options.actions) or await _examples(client) or Plan.actions)
        http = None
        if not url.startswith(OPENENV_PREFIX):
            http = await stack.enter_async_context(_raw(url, token, options.timeout_s))
        subject = Subject(client, crowd, info, http, plan)
        findings = []
        for name, check in _checks(subject, options):
            finding = await _run(name, check, subject, options.check_limit_s)
            tell(finding)
            findings.append(finding)
        told = []
        for name, look in (("actions", notes.actions), ("facts", notes.facts), ("repeats", notes.repeats)):
            note = await _look(name, look, subject, options.check_limit_s)
            tell(note)
            told.append(note)
        return Report(url, info, tuple(findings), tuple(told))


async def _examples(client: EnvironmentClient) -> tuple[str, ...]:
    """Valid actions by the server's schemas, where it has any."""
    return tuple(await client.example_actions(EXAMPLES)) if isinstance(client, OpenEnvClient) else ()


async def _look(name: str, look: Look, subject: Subject, limit_s: float) -> Finding:
    """A note, also on what could not be seen: that is a failed check's business."""
    try:
        async with asyncio.timeout(limit_s):
            return await look(subject)
    except (TimeoutError, EnvironmentUnavailableError, RequestRejected, SessionLost) as error:
        return Finding(name, "note", f"could not be seen: {one_line(str(error)) or f'not done within {limit_s:g} s'}")


def _checks(subject: Subject, options: Options) -> list[tuple[str, Check]]:
    measure = partial(
        speed, sessions=options.sessions, seconds=options.seconds, least_steps_per_s=options.least_steps_per_s
    )
    of_the_api: list[tuple[str, Check]] = [
        ("idempotent", asking.idempotent),
        ("bounded", asking.bounded),
        ("clear errors", asking.clear_errors),
    ]
    return [
        ("deterministic", playing.deterministic),
        ("isolated", playing.isolated),
        *(of_the_api if subject.http is not None else []),
        ("honest endings", playing.honest_endings),
        ("anchors", playing.anchors),
        ("speed", measure),
    ]


async def _run(name: str, check: Check, subject: Subject, limit_s: float) -> Finding:
    try:
        async with asyncio.timeout(limit_s):
            return Finding(name, "ok", await check(subject))
    except Unfit as error:
        return Finding(name, "fail", str(error))
    except TimeoutError:
        return Finding(name, "fail", f"not done within {limit_s:g} s")
    except (EnvironmentUnavailableError, RequestRejected, SessionLost) as error:
        return Finding(name, "fail", f"a valid request failed: {one_line(str(error))}")
    except (aiohttp.ClientError, ValidationError) as error:
        return Finding(name, "fail", f"the server's answer cannot be understood: {one_line(str(error))}")


def _raw(url: str, token: str | None, timeout_s: float) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        base_url=url.rstrip("/") + "/",
        headers={} if token is None else {"Authorization": f"Bearer {token}"},
        timeout=aiohttp.ClientTimeout(total=timeout_s),
    )
