"""The event stream of a run: new records and changed state, as server-sent events.

The events are `metrics`, `run`, `buffer`, `actors`, `commands` and `warnings`, with the bodies of the routes of these
names. Each is sent at the start (`metrics` even if there are no records) and then whenever it changes.

Invariants
- A run is read at most once a second, shared between streams. No stream lives longer than `MAX_S`; clients reconnect.
- A `metrics` event holds the records `next - len(records)` to `next`; it starts at 0 when the file was rewritten.

Example: a client that has 5 records of generation 17 connects with `after=5&generation=17`. While the run goes on it
gets records 5, 6, …; if the run was resumed meanwhile, which rewrites the file, it gets all records of generation 18.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.sse import ServerSentEvent
from pydantic import BaseModel

from services.control import run_views
from services.control.runs import Run

EVERY_S = 1.0
AGAIN_S = 5.0
MAX_S = 3600.0
FIRST_RECORDS = 5000

_WATCHED: dict[str, Callable[[Run], BaseModel]] = {
    "run": Run.view,
    "buffer": run_views.buffer,
    "actors": run_views.actors,
    "commands": run_views.commands,
    "warnings": run_views.warnings,
}
_PASSING: dict[str, Any] = {"actors": {"actors": {"__all__": {"heard_s"}}}}
"""Fields that change by the passing of time alone: they cause an event only every `AGAIN_S`, as a sign of life."""


async def stream(
    find: Callable[[], Run | None], after: int, generation: int | None, closing: asyncio.Event
) -> AsyncIterator[ServerSentEvent]:
    """Yield events until the client disconnects, the server stops, or the run is gone.

    Args:
        find: returns the run; called every time, since a restarted run is another object.
        after: number of records that the client has.
        generation: generation of those records. If it has changed, the client gets all records.
        closing: set when the server stops.
    """
    end = time.monotonic() + MAX_S
    sent: dict[str, str] = {}
    sent_once = False
    while time.monotonic() < end and not closing.is_set():
        run = await asyncio.to_thread(find)
        if run is None:
            return
        found = await asyncio.to_thread(run_views.metrics, run, after, FIRST_RECORDS, None)
        if found.generation != generation:
            if generation is not None and after:
                found = await asyncio.to_thread(run_views.metrics, run, 0, FIRST_RECORDS, None)
            generation, sent_once = found.generation, False
        if found.records or not sent_once:
            after, sent_once = found.next, True
            yield ServerSentEvent(event="metrics", raw_data=found.model_dump_json())
        for name, view_of in _WATCHED.items():
            view = await asyncio.to_thread(view_of, run)
            mark = view.model_dump_json(exclude=_PASSING.get(name))
            if name in _PASSING:
                mark += f"{time.monotonic() // AGAIN_S}"
            if sent.get(name) != mark:
                sent[name] = mark
                yield ServerSentEvent(event=name, raw_data=view.model_dump_json())
        await asyncio.sleep(EVERY_S)
