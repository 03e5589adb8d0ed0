"""Runs all checks of a server in order, each with a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import aiohttp
from pydantic import ValidationError

from env_servers.client import (
    OPENENV_PREFIX,
    EnvironmentClient,
    EnvironmentUnavailableError,
    HttpClient,
    OpenEnvClient,
    RequestRejected,
    SessionLost,
    open_client,
)
from env_servers.clients.bodies import AnswerTooLong
from env_servers.conformance import api_checks, notes, play_checks
from env_servers.conformance.findings import Check, Finding, Subject, Unfit
from env_servers.conformance.play import Plan, sample_tasks
from env_servers.conformance.speed import speed
from env_servers.errors import one_line, summary
from env_servers.protocol import EnvInfo

PATIENCE_S = 5.0
EXAMPLES = 64

Note = Callable[[Subject], Awaitable[Finding]]


@dataclass(frozen=True)
class Options:
    """How thoroughly a server is checked.

    Attributes:
        tasks: number of tasks to play.
        steps: maximum number of actions of an episode.
        sessions: concurrent sessions of the speed measurement.
        seconds: length of the speed measurement.
        least_steps_per_s: minimum rate; a slower server is not fit.
        timeout_s: time limit of a request, in seconds.
        check_limit_s: time limit of a check, in seconds.
        actions: actions to try where the server lists none; empty: those that its schemas suggest, or common ones.
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
    """What all checks found.

    Attributes:
        url: address of the server.
        info: what the server serves.
        findings: conditions of fitness.
        notes: what is no condition of fitness.
    """

    url: str
    info: EnvInfo
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...] = ()

    @property
    def fit(self) -> bool:
        return all(finding.verdict != "fail" for finding in self.findings)


async def check_server(
    url: str, token: str | None = None, options: Options = Options(), tell: Callable[[Finding], None] = lambda _: None
) -> Report:
    """Run all checks on a server.

    Args:
        url: its address, `http://…` or `openenv+http://…`.
        token: bearer token; none: the server requires none.
        options: how thoroughly to check.
        tell: called after each check.

    Raises:
        EnvironmentUnavailableError: there is no server to check.
        RequestRejected: the server refuses to say what it serves, such as for a wrong token.
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
        for name, note in (("actions", notes.actions), ("facts", notes.facts), ("repeats", notes.repeats)):
            finding = await _note(name, note, subject, options.check_limit_s)
            tell(finding)
            told.append(finding)
        return Report(url, info, tuple(findings), tuple(told))


async def _examples(client: EnvironmentClient) -> tuple[str, ...]:
    """Valid actions by an OpenEnv server's schemas; empty for others."""
    return tuple(await client.example_actions(EXAMPLES)) if isinstance(client, OpenEnvClient) else ()


async def _note(name: str, note: Note, subject: Subject, limit_s: float) -> Finding:
    """A note. If the server fails meanwhile, it says so: the failed checks say the rest."""
    try:
        async with asyncio.timeout(limit_s):
            return await note(subject)
    except (TimeoutError, EnvironmentUnavailableError, RequestRejected, SessionLost) as error:
        return Finding(name, "note", f"not checked: {one_line(error) or f'not finished within {limit_s:g} s'}")


def _checks(subject: Subject, options: Options) -> list[tuple[str, Check]]:
    measure = partial(
        speed, sessions=options.sessions, seconds=options.seconds, least_steps_per_s=options.least_steps_per_s
    )
    of_the_api: list[tuple[str, Check]] = [
        ("idempotent", api_checks.idempotent),
        ("bounded", api_checks.bounded),
        ("clear errors", api_checks.clear_errors),
    ]
    return [
        ("deterministic", play_checks.deterministic),
        ("isolated", play_checks.isolated),
        *(of_the_api if subject.http is not None else []),
        ("honest endings", play_checks.honest_endings),
        ("anchors", play_checks.anchors),
        ("speed", measure),
    ]


async def _run(name: str, check: Check, subject: Subject, limit_s: float) -> Finding:
    try:
        async with asyncio.timeout(limit_s):
            return Finding(name, "ok", await check(subject))
    except Unfit as error:
        return Finding(name, "fail", str(error))
    except TimeoutError:
        return Finding(name, "fail", f"not finished within {limit_s:g} s")
    except (EnvironmentUnavailableError, RequestRejected, SessionLost) as error:
        return Finding(name, "fail", f"a valid request failed: {one_line(error)}")
    except ValidationError as error:
        return Finding(name, "fail", f"invalid response: {one_line(summary(error))}")
    except (aiohttp.ClientError, AnswerTooLong, OSError) as error:
        return Finding(name, "fail", f"invalid response: {one_line(error) or type(error).__name__}")


def _raw(url: str, token: str | None, timeout_s: float) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        base_url=url.rstrip("/") + "/",
        headers={} if token is None else {"Authorization": f"Bearer {token}"},
        timeout=aiohttp.ClientTimeout(total=timeout_s),
    )
