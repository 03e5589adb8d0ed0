"""Whether a server refuses sessions beyond its limit: by opening them all, where that can be done in a short time."""

from __future__ import annotations

import asyncio
import time

from env_servers.conformance.findings import Subject, Unfit
from env_servers.protocol import StepResult

FILLED_UP_TO = 4096
FILLING_S = 10.0
AT_ONCE = 32

Refusal = tuple[int, str | None]
"""Status and Retry-After."""


async def fill(subject: Subject) -> str:
    """Open sessions until the server says that it is full, and close them again; in words, what was seen.

    Where there are too many sessions, or they open too slowly, the words say that it was not checked.
    """
    most = subject.info.max_sessions
    if most > FILLED_UP_TO:
        return f"back-pressure NOT CHECKED: {most} sessions are more than the {FILLED_UP_TO} that a check opens"
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
            f"with {len(opened)} sessions open (limit {most}) a reset was answered {status}, not 503 with Retry-After"
        )
    return f"session {len(opened) + 1} was refused with {status} and Retry-After"


async def _open(subject: Subject, opened: list[str], count: int) -> Refusal | None:
    """Open up to `count` sessions, some at once; the first refusal, None where there was none or no time."""
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
    """The session's id, or why there is none."""
    assert subject.http is not None
    body = subject.plan.tasks[0].model_dump_json()
    async with subject.http.post("reset", data=body, headers={"Content-Type": "application/json"}) as response:
        answer = await response.read()
        if response.status == 200:
            return StepResult.model_validate_json(answer).session
        return response.status, response.headers.get("Retry-After")


async def _close(subject: Subject, opened: list[str]) -> None:
    for start in range(0, len(opened), AT_ONCE):
        await asyncio.gather(*map(subject.client.close_session, opened[start : start + AT_ONCE]))
