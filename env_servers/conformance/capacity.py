"""Checks that a server refuses sessions beyond its limit, by opening them all if that takes only seconds."""

from __future__ import annotations

import asyncio
import time

from env_servers.clients.bodies import read_body
from env_servers.conformance.findings import Subject, Unfit
from env_servers.protocol import StepResult

FILLED_UP_TO = 4096
FILLING_S = 10.0
AT_ONCE = 32

Refusal = tuple[int, str | None]
"""Status and Retry-After."""


async def fill(subject: Subject) -> str:
    """Open sessions until the server is full, and close them again.

    Returns:
        What was seen, in words. If there are too many sessions, or they open too slowly: that it was not checked.

    Raises:
        Unfit: the server exceeds its limit, or refuses without 503 and Retry-After.
    """
    most = subject.info.max_sessions
    if most > FILLED_UP_TO:
        return f"back-pressure NOT CHECKED: max_sessions is {most:,}, a check opens at most {FILLED_UP_TO:,}"
    opened: list[str] = []
    try:
        refusal = await _open(subject, opened, most + 1)
    finally:
        await _close(subject, opened)
    if refusal is None and len(opened) <= most:
        return f"back-pressure NOT CHECKED: only {len(opened)} of {most} sessions opened within {FILLING_S:g} s"
    status, retry_after = refusal or (200, None)
    if status not in (429, 503) or retry_after is None:
        raise Unfit(
            f"a reset with {len(opened)} sessions open (limit {most}): expected 503 with Retry-After, got {status}"
        )
    return f"session {len(opened) + 1} was refused ({status} with Retry-After)"


async def _open(subject: Subject, opened: list[str], count: int) -> Refusal | None:
    """Open up to `count` sessions, `AT_ONCE` at a time; the first refusal, None if there was none in time."""
    until = time.monotonic() + FILLING_S
    while len(opened) < count and time.monotonic() < until:
        wave = min(AT_ONCE, max(1, count - 1 - len(opened)))  # the one beyond the limit comes alone
        answers = await asyncio.gather(*(_reset(subject) for _ in range(wave)))
        opened += [answer for answer in answers if isinstance(answer, str)]
        refusals = [answer for answer in answers if not isinstance(answer, str)]
        if refusals:
            return refusals[0]
    return None


async def _reset(subject: Subject) -> str | Refusal:
    """The id of a new session, or the refusal."""
    assert subject.http is not None
    body = subject.plan.tasks[0].model_dump_json()
    async with subject.http.post("reset", data=body, headers={"Content-Type": "application/json"}) as response:
        answer = await read_body(response)
        if response.status == 200:
            return StepResult.model_validate_json(answer).session
        return response.status, response.headers.get("Retry-After")


async def _close(subject: Subject, opened: list[str]) -> None:
    for start in range(0, len(opened), AT_ONCE):
        await asyncio.gather(*map(subject.client.close_session, opened[start : start + AT_ONCE]))
