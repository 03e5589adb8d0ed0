"""Checks of the step API: idempotent, bounded, clear errors. They send requests that no client would."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
from pydantic import ValidationError

from env_servers.clients.bodies import read_body
from env_servers.conformance.capacity import fill
from env_servers.conformance.findings import Subject, Unfit
from env_servers.conformance.play import difference
from env_servers.errors import one_line
from env_servers.protocol import MAX_ACTION_CHARS, MAX_BATCH, Problem, ResetRequest, StepResult

PROBLEM_TYPE = "application/problem+json"
LONG_BODY_BYTES = 16 * 1024 * 1024
LEAKS = ("Traceback", 'File "')
BAD = frozenset({400, 404, 422})
LOST = frozenset({404, 410})


@dataclass(frozen=True)
class Wrong:
    """A request that must be refused.

    Attributes:
        what: the request in words, for messages.
        method, path, body: the request. A body of bytes is sent unchanged, another as JSON.
        statuses: the statuses that are a right answer.
        media_type: content type of the body.
    """

    what: str
    method: str
    path: str
    body: Any
    statuses: frozenset[int]
    media_type: str = "application/json"


async def idempotent(subject: Subject) -> str:
    """A repeated step returns the same result and is taken once; a step out of order is a 409."""
    task = subject.plan.tasks[0]
    once = await _play(subject, task, times=1)
    if found := difference(once, await _play(subject, task, times=4)):
        raise Unfit(f"the episode changes when each step is sent five times: {found}")
    first = await subject.client.reset(task)
    for step, what in ((2, "step 2 right after a reset"), (0, "step 0")):
        statuses = frozenset({409}) if step else frozenset({409, 422})
        await expect(subject, Wrong(what, "POST", "step", _step(first.session, step), statuses))
    await subject.client.close_session(first.session)
    return f"{len(once) - 1} steps, each sent five times: taken once, equal results; steps out of order get 409"


async def bounded(subject: Subject) -> str:
    """Bodies, batches, actions and sessions have limits, and a closed session is gone."""
    if subject.info.max_sessions < 1 or not subject.info.idle_seconds > 0:
        raise Unfit("GET /info has no valid max_sessions and idle_seconds")
    first = await subject.client.reset(subject.plan.tasks[0])
    session = first.session
    refused = frozenset({400, 413, 422})
    long_action = _step(session, 1, "x" * (MAX_ACTION_CHARS + 1))
    await expect(
        subject, Wrong(f"an action of {MAX_ACTION_CHARS + 1} characters", "POST", "step", long_action, refused)
    )
    many = {"items": [_step(session, 1)] * (MAX_BATCH + 1)}
    await expect(subject, Wrong(f"a batch of {MAX_BATCH + 1} steps", "POST", "batch/step", many, refused))
    await _long_body(subject)
    await subject.client.step(session, 1, (first.admissible or subject.plan.actions)[0])
    await subject.client.close_session(session)
    await expect(subject, Wrong("a step of a closed session", "POST", "step", _step(session, 2), LOST))
    return f"actions, batches and bodies have limits; {await fill(subject)}; closed sessions are gone"


async def clear_errors(subject: Subject) -> str:
    """An invalid request is refused with a 4xx and a problem document of one line that reveals no internals."""
    mistakes = _mistakes(subject)
    for mistake in mistakes:
        await expect(subject, mistake)
    return f"{len(mistakes)} invalid requests: each got a 4xx and a problem document that says what is wrong"


def _mistakes(subject: Subject) -> list[Wrong]:
    split, size = next(iter(subject.info.splits.items()))
    task = {"split": split, "index": 0}
    text = frozenset({400, 415, 422})
    return [
        Wrong("an unknown split", "POST", "reset", {"split": "no such split", "index": 0}, BAD),
        Wrong("an index beyond the split", "POST", "reset", {"split": split, "index": size}, BAD),
        Wrong("a negative index", "POST", "reset", {"split": split, "index": -1}, BAD),
        Wrong("an index with 30 digits", "POST", "reset", b'{"split":"%b","index":%d}' % (split.encode(), 10**30), BAD),
        Wrong("an unknown field", "POST", "reset", {**task, "no_such_field": 1}, BAD),
        Wrong("a missing field", "POST", "reset", {"split": split}, BAD),
        Wrong("max_steps 0", "POST", "reset", {**task, "max_steps": 0}, BAD),
        Wrong("a body that is not JSON", "POST", "reset", b"{", BAD),
        Wrong("a body that is a list", "POST", "step", [], BAD),
        Wrong("a body of content type text/plain", "POST", "reset", orjson.dumps(task), text, "text/plain"),
        Wrong("a step of an unknown session", "POST", "step", _step("x", 1), LOST),
        Wrong("closing an unknown session", "POST", "close", {"session": "x"}, LOST),
        Wrong("an action that is a number", "POST", "step", {"session": "x", "step": 1, "action": 5}, BAD),
        Wrong("an unknown route", "GET", "no-such-route", None, frozenset({404})),
        Wrong("a wrong method", "GET", "step", None, frozenset({404, 405})),
    ]


async def expect(subject: Subject, wrong: Wrong) -> None:
    """Send a request that must be refused.

    Raises:
        Unfit: it was not refused, or not with a clear problem document.
    """
    assert subject.http is not None
    body = wrong.body if isinstance(wrong.body, bytes) or wrong.body is None else orjson.dumps(wrong.body)
    headers = {"Content-Type": wrong.media_type}
    async with subject.http.request(wrong.method, wrong.path, data=body, headers=headers) as response:
        status, answer = response.status, await read_body(response)
        media_type = response.headers.get("Content-Type", "").partition(";")[0]
    if status not in wrong.statuses:
        expected = " or ".join(map(str, sorted(wrong.statuses)))
        raise Unfit(f"{wrong.what}: expected status {expected}, got {status}")
    try:
        problem = Problem.model_validate_json(answer)
    except ValidationError:
        raise Unfit(f"{wrong.what}: status {status} without a problem document (RFC 9457)") from None
    if media_type != PROBLEM_TYPE:
        found = one_line(media_type) or "none"
        raise Unfit(f"{wrong.what}: the problem document's content type is {found}, not {PROBLEM_TYPE}")
    if not problem.detail or "\n" in problem.detail or any(leak in problem.detail for leak in LEAKS):
        raise Unfit(f"{wrong.what}: the problem's detail must be one line without a traceback: {problem.detail!r:.100}")


async def _play(subject: Subject, task: ResetRequest, times: int) -> list[StepResult]:
    """Play a task and send each step `times` times at once, and once more afterwards."""
    client = subject.client
    seen = [await client.reset(task)]
    session = seen[0].session
    while not seen[-1].done and len(seen) <= subject.plan.steps:
        choices = seen[-1].admissible or subject.plan.actions
        step, action = seen[-1].step + 1, choices[len(seen) % len(choices)]
        answers = await asyncio.gather(*(client.step(session, step, action) for _ in range(times)))
        if times > 1:
            answers.append(await client.step(session, step, action))
        if any(answer != answers[0] for answer in answers):
            raise Unfit(f"{task.split}/{task.index}: step {step}, sent again, got another result")
        seen.append(answers[0])
    await client.close_session(session)
    return seen


async def _long_body(subject: Subject) -> None:
    assert subject.http is not None
    body = b'{"session":"x","step":1,"action":"' + b"x" * LONG_BODY_BYTES + b'"}'
    try:
        async with subject.http.post("step", data=body, headers={"Content-Type": "application/json"}) as response:
            status = response.status
    except aiohttp.ClientConnectionError:
        return  # a server may refuse a body by closing the connection while it is being sent
    if status not in (400, 413, 422):
        raise Unfit(f"a body of {LONG_BODY_BYTES >> 20} MiB: expected status 413, got {status}")


def _step(session: str, step: int, action: str = "look") -> dict[str, object]:
    return {"session": session, "step": step, "action": action}
