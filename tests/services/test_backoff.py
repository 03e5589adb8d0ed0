from __future__ import annotations

import time

import pytest

from services.backoff import Backoff, Patience


def test_delays_double_up_to_the_longest() -> None:
    backoff = Backoff(0.5, 3.0)
    assert [backoff.delay(failures) for failures in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff.delay(1_000_000) == 3.0


def test_jitter_keeps_at_least_half() -> None:
    delays = {Backoff(1.0, 1.0, jitter=True).delay(1) for _ in range(200)}
    assert len(delays) > 100
    assert min(delays) >= 0.5
    assert max(delays) <= 1.0


def test_attempts_end_at_their_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    attempts = Backoff(1.0, 4.0).within(6.0)
    delays = []
    while (delay := attempts.next_delay()) is not None:
        delays.append(delay)
        now += delay
    assert delays == [1.0, 2.0, 3.0]  # the third would be 4 s, and ends at the deadline
    assert attempts.failures == 4
    assert now == 106.0


def test_whoever_waits_long_looks_seldom_and_sees_a_change_soon():
    patience = Patience(0.2, 2.0)
    assert [patience.delay(waited) for waited in (0, 4, 10, 40, 4000)] == [0.2, 0.2, 0.5, 2.0, 2.0]
    waited, looks = 0.0, 0
    while waited < 600.0:
        waited += patience.delay(waited)
        looks += 1
    assert looks < 400  # 3,000 at the shortest
