"""The event stream of a run: new records and changed facts, as server-sent events.

Events: `metrics` (as the metrics route answers), `run`, `buffer`, `actors`, `commands` (as theirs), each sent at first
and then whenever it changes.

Invariants
- One look at the run a second, shared between streams; no stream lives longer than `MAX_S`, clients come again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from fastapi.sse import ServerSentEvent
from pydantic import BaseModel

from services.control import answers
from services.control.runs import Run

EVERY_S = 1.0
MAX_S = 3600.0
FIRST_RECORDS = 5000

_WATCHED: dict[str, Callable[[Run], BaseModel]] = {
    "run": Run.view,
    "buffer": answers.buffer,
    "actors": answers.actors,
    "commands": answers.commands,
}


async def stream(run: Run, after: int, closing: asyncio.Event) -> AsyncIterator[ServerSentEvent]:
    """Events until the client or the server ends."""
    ends = time.monotonic() + MAX_S
    generation = run.metrics.generation
    sent: dict[str, str] = {}
    while time.monotonic() < ends and not closing.is_set():
        found = await asyncio.to_thread(answers.metrics, run, after, FIRST_RECORDS, None)
        if found.generation != generation:
            generation, after = found.generation, 0
            found = await asyncio.to_thread(answers.metrics, run, after, FIRST_RECORDS, None)
        if found.records:
            after = found.next
            yield ServerSentEvent(event="metrics", raw_data=found.model_dump_json())
        for name, ask in _WATCHED.items():
            text = (await asyncio.to_thread(ask, run)).model_dump_json()
            if sent.get(name) != text:
                sent[name] = text
                yield ServerSentEvent(event=name, raw_data=text)
        await asyncio.sleep(EVERY_S)
