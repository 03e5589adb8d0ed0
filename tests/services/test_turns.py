"""Turns of an episode against a plain statement, and the worked example."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.schemas import Step
from services.turns import turns_of

EMPTY = np.zeros(0, dtype=np.int32)


def call(turn: int = -1, *, trained: bool = True, anchor: str = "A", reward: float = 0.0, valid: bool = True) -> Step:
    return Step(
        prompt_ids=EMPTY,
        response_ids=EMPTY,
        logprobs=EMPTY.astype(np.float32),
        versions=(),
        anchor=anchor,
        observation="",
        prompt="",
        response="",
        action="",
        reward=reward,
        valid=valid,
        turn=turn,
        trained=trained,
    )


CALLS = st.builds(
    call,
    st.integers(-1, 4),
    trained=st.booleans(),
    anchor=st.sampled_from("ABC"),
    reward=st.sampled_from([0.0, 0.25, 1.0, -0.5]),
    valid=st.booleans(),
)


def test_the_worked_example() -> None:
    found = turns_of(
        [
            call(0, anchor="A"),
            call(0, anchor="A", reward=1.0, valid=False),
            call(trained=False, reward=0.5),
            call(1, anchor="B"),
            call(anchor="C", reward=10.0),
        ]
    )
    assert found.number == [0, 0, -1, 1, 2]
    assert found.anchor == ["A", "B", "C"]
    assert found.reward == [1.5, 0.0, 10.0]
    assert found.valid == [False, True, True]


@given(st.lists(CALLS, max_size=12))
def test_turns_are_their_plain_statement(calls: list[Step]) -> None:
    found = turns_of(calls)
    keys = [(step.turn, None if step.turn >= 0 else place) for place, step in enumerate(calls)]
    names: list[object] = []
    for key, step in zip(keys, calls, strict=True):
        if step.trained and key not in names:
            names.append(key)
    assert len(found) == len(names)
    assert found.number == [names.index(key) if step.trained else -1 for key, step in zip(keys, calls, strict=True)]
    for number, name in enumerate(names):
        own = [step for key, step in zip(keys, calls, strict=True) if key == name and step.trained]
        assert found.anchor[number] == own[0].anchor
        assert found.valid[number] == all(step.valid for step in own)
    if names:
        assert math.isclose(sum(found.reward), sum(step.reward for step in calls), abs_tol=1e-12)


@given(st.lists(CALLS, min_size=1, max_size=12))
def test_the_reward_of_an_untrained_call_goes_to_the_turn_that_it_names_or_the_one_before(calls: list[Step]) -> None:
    found = turns_of(calls)
    for place, step in enumerate(calls):
        if step.trained or not len(found):
            continue
        without = turns_of([*calls[:place], call(step.turn, trained=False), *calls[place + 1 :]])
        changed = [number for number in range(len(found)) if found.reward[number] != without.reward[number]]
        same = [n for s, n in zip(calls, found.number, strict=True) if n >= 0 and s.turn == step.turn >= 0]
        before = [n for n in found.number[:place] if n >= 0]
        # An untrained call before it may name a turn, which then is the one before.
        named_before = any(not s.trained and s.turn >= 0 for s in calls[:place])
        if step.reward == 0:
            assert changed == []
        elif same:
            assert changed == same[:1]
        elif not named_before:
            assert changed == [before[-1] if before else 0]


def test_an_episode_without_a_trained_call_has_no_turn() -> None:
    found = turns_of([call(trained=False, reward=1.0), call(3, trained=False)])
    assert found.number == [-1, -1]
    assert len(found) == 0
    assert len(turns_of([])) == 0
