from __future__ import annotations

import itertools

import pytest

from learner.rank.schedule import FINAL_SHARE, rate_factor
from services.config.tree import Config


def rates(schedule: str, warmup: int = 0) -> list[float]:
    config = Config.model_validate(
        {"optimizer": {"schedule": schedule, "warmup_updates": warmup}, "learner": {"updates": 5, "minibatches": 2}}
    )
    return [rate_factor(step, config) for step in range(12)]


def test_constant_stays_after_the_warm_up() -> None:
    assert rates("constant") == [1.0] * 12
    assert rates("constant", 2) == [0.25, 0.5, 0.75, 1.0] + [1.0] * 8


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_falling_schedules_begin_at_the_peak_and_end_with_the_run(schedule: str) -> None:
    falling = rates(schedule, 1)
    assert falling[1] == falling[2] == 1.0
    assert all(before > after for before, after in itertools.pairwise(falling[2:11]))
    assert falling[10] == falling[11] == pytest.approx(FINAL_SHARE)


def test_halfway_a_linear_schedule_is_in_the_middle() -> None:
    assert rates("linear")[5] == pytest.approx((1 + FINAL_SHARE) / 2)
