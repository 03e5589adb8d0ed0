"""What the chaos run calls growth, on made-up samples."""

import pytest

from tests.chaos.run import late


def samples(memory):
    """(age, MiB, descriptors) every two seconds."""
    return [(age, memory(age), 3) for age in range(30, 210, 2)]


@pytest.mark.parametrize(
    ("memory", "grown"),
    [
        (lambda age: 100.0 + age, 60.0),
        (lambda age: 100.0 + min(age, 90), 0.0),
        (lambda age: 100.0 + 5 * (age % 20), 0.0),
        (lambda age: 100.0 + 50 * (age == 190), 0.0),
    ],
    ids=["for ever", "levels off", "up and down", "one peak"],
)
def test_late_growth_tells_what_goes_on_from_what_levels_off(memory, grown):
    assert late(samples(memory), 1) == pytest.approx(grown, abs=3)
    assert late(samples(memory), 2) == 0


def test_a_short_life_says_nothing():
    assert late(samples(lambda age: 100.0 + age)[:30], 1) == 0.0
    assert late([(40.0, 1.0, 1), (200.0, 9.0, 1)], 1) == 0.0
