"""Measures how fast a server is. Not a condition of fitness, unless a minimum rate is requested."""

from __future__ import annotations

import asyncio
import time

from env_servers.conformance.findings import Subject, Unfit
from env_servers.conformance.play import turns


async def speed(subject: Subject, sessions: int, seconds: float, least_steps_per_s: float) -> str:
    """Measure steps/s of concurrent sessions that wait for each answer, and latencies.

    Args:
        subject: the server.
        sessions: concurrent sessions.
        seconds: length of the measurement.
        least_steps_per_s: minimum rate.

    Raises:
        Unfit: the rate is below `least_steps_per_s`.
    """
    resets: list[float] = []
    steps: list[float] = []
    until = time.perf_counter() + seconds

    async def play(number: int) -> None:
        tasks = subject.plan.tasks
        while time.perf_counter() < until:
            began = time.perf_counter()
            async for seen in turns(subject.crowd, tasks[number % len(tasks)], subject.plan, str(number)):
                now = time.perf_counter()
                (steps if seen.step else resets).append(now - began)
                if now > until:
                    break
                began = time.perf_counter()
            number += sessions

    began = time.perf_counter()
    await asyncio.gather(*(play(number) for number in range(sessions)))
    rate = len(steps) / (time.perf_counter() - began)
    told = f"{rate:,.0f} steps/s with {sessions} sessions; step {_times(steps)}; reset {_times(resets)}"
    if rate < least_steps_per_s:
        raise Unfit(f"{told}: below the minimum of {least_steps_per_s:,.0f} steps/s")
    return told


def _times(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    ordered = sorted(seconds)
    median, slow = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.95)]
    return f"median {1e3 * median:,.1f} ms, 95 % {1e3 * slow:,.1f} ms"
