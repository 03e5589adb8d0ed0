"""The event stream of a run: new records and changed facts, as server-sent events.

Events: `metrics` (as the metrics route answers), `run`, `buffer`, `actors`, `commands` (as theirs), each sent at first,
`metrics` even where there are none, and then whenever it changes.

Invariants
- One look at the run a second, shared between streams; no stream lives longer than `MAX_S`, clients come again.
- A `metrics` event holds the records from number `next` − how many there are: from 0 when the stream was rewritten.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.sse import ServerSentEvent
from pydantic import BaseModel

from services.control import run_views as answers
from services.control.runs import Run

EVERY_S = 1.0
AGAIN_S = 5.0
MAX_S = 3600.0
FIRST_RECORDS = 5000

_WATCHED: dict[str, Callable[[Run], BaseModel]] = {
    "run": Run.view,
    "buffer": answers.buffer,
    "actors": answers.actors,
    "commands": answers.commands,
}
_PASSING: dict[str, Any] = {"actors": {"actors": {"__all__": {"heard_s"}}}}
"""What changes by the mere passing of time: reason to send only every `AGAIN_S`, so that it is known to be so."""


async def stream(
    find: Callable[[], Run | None], after: int, generation: int | None, closing: asyncio.Event
) -> AsyncIterator[ServerSentEvent]:
    """Events until the client or the server ends, or the run is gone.

    `find` is asked at every look: a run that begins anew, or goes on, is read by another object. `after` records of
    `generation` are known to the client; where the generation is another one by now, it gets all.
    """
    ends = time.monotonic() + MAX_S
    sent: dict[str, str] = {}
    told = False
    while time.monotonic() < ends and not closing.is_set():
        run = await asyncio.to_thread(find)
        if run is None:
            return
        found = await asyncio.to_thread(answers.metrics, run, after, FIRST_RECORDS, None)
        if found.generation != generation:
            if generation is not None and after:
                found = await asyncio.to_thread(answers.metrics, run, 0, FIRST_RECORDS, None)
            generation, told = found.generation, False
        if found.records or not told:
            after, told = found.next, True
            yield ServerSentEvent(event="metrics", raw_data=found.model_dump_json())
        for name, ask in _WATCHED.items():
            view = await asyncio.to_thread(ask, run)
            mark = view.model_dump_json(exclude=_PASSING.get(name))
            if name in _PASSING:
                mark += f"{time.monotonic() // AGAIN_S}"
            if sent.get(name) != mark:
                sent[name] = mark
                yield ServerSentEvent(event=name, raw_data=view.model_dump_json())
        await asyncio.sleep(EVERY_S)
