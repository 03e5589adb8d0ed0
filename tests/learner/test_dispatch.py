import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.dispatch import Dispatcher
from services.config.tree import Config
from services.errors import EnvironmentUnavailable

SPLITS = {"train": 7, "valid_unseen": 3}


def configured(seed=0, staleness=1, groups=3, tasks=None):
    return Config.model_validate(
        {
            "run": {"seed": seed},
            "env": {"tasks": tasks},
            "learner": {"max_staleness": staleness, "groups_per_update": groups, "group_size": 2},
        }
    )


@given(st.integers(0, 5), st.integers(1, 7))
def test_every_epoch_plays_each_task_once(seed, tasks):
    dispatcher = Dispatcher(configured(seed, tasks=tasks), SPLITS)
    for epoch in range(3):
        played = [dispatcher.task(group).index for group in range(epoch * tasks, (epoch + 1) * tasks)]
        assert sorted(played) == list(range(tasks))


def test_epochs_and_seeds_differ():
    orders = [
        tuple(Dispatcher(configured(seed), {"train": 50}).task(g).index for g in range(start, start + 50))
        for seed in (0, 1)
        for start in (0, 50)
    ]
    assert len(set(orders)) == 4


def test_tickets_are_pure_functions_of_seed_and_group():
    one, other = (Dispatcher(configured(), SPLITS) for _ in range(2))
    other.advance(10)
    assert one.tickets([4, 2]) == other.tickets([2, 4])
    tickets = one.tickets(range(100))
    assert len({ticket.seed for ticket in tickets}) == len(tickets)
    assert all(0 <= ticket.seed < 2**31 for ticket in tickets)


@given(
    st.integers(0, 3), st.integers(1, 4), st.lists(st.sampled_from(["issue", "train", "cancel", "drop"]), max_size=60)
)
def test_staleness_is_bounded_and_groups_are_used_in_order(staleness, size, events):
    """Every group is trained on at most once, in ascending order, at most `max_staleness` updates after its issue."""
    dispatcher = Dispatcher(configured(staleness=staleness, groups=size), SPLITS)
    issued_at, trained, version = {}, [], 0
    for event in [*events, "issue", "train"]:
        if event == "issue":
            issued_at |= dict.fromkeys(dispatcher.advance(1000), version)
        elif event == "cancel" and dispatcher.outstanding:
            dispatcher.settle([max(dispatcher.outstanding)])
        elif event == "drop" and dispatcher.outstanding:
            dispatcher.settle(dispatcher.window()[:1])
        elif event == "train" and len(dispatcher.window()) == size:
            window = dispatcher.window()
            assert all(version - issued_at[group] <= staleness for group in window)
            trained += window
            dispatcher.settle(window)
            version += 1
        assert len(dispatcher.outstanding) <= (staleness + 1) * size
    assert trained == sorted(set(trained))


def test_no_more_groups_go_out_than_the_run_can_use():
    dispatcher = Dispatcher(configured(staleness=3, groups=2), SPLITS)
    assert dispatcher.advance(updates_left=1) == [0, 1]
    assert dispatcher.advance(updates_left=1) == []


def test_state_survives_json():
    dispatcher = Dispatcher(configured(), SPLITS)
    dispatcher.advance(10)
    dispatcher.settle([0, 2])
    other = Dispatcher(configured(), SPLITS)
    other.restore(json.loads(json.dumps(dispatcher.state())))
    assert other.outstanding == dispatcher.outstanding
    assert other.advance(10) == dispatcher.advance(10)
    with pytest.raises(ValueError, match="state"):
        other.restore({"cursor": "x"})


def test_missing_and_finished():
    dispatcher = Dispatcher(configured(), SPLITS)
    dispatcher.advance(10)
    dispatcher.settle([0, 1])
    assert dispatcher.missing({0, 2, 3}) == [4, 5]
    assert dispatcher.finished({0, 2, 3, 99}) == [0]


def test_unknown_split():
    with pytest.raises(EnvironmentUnavailable, match=r"'train'; it offers valid \(3\)"):
        Dispatcher(configured(), {"valid": 3})


def test_tickets_cover_their_groups():
    tickets = Dispatcher(configured(), SPLITS).tickets([0, 1])
    assert Counter(ticket.group for ticket in tickets) == {0: 2, 1: 2}
    assert len({ticket.task for ticket in tickets if ticket.group == 0}) == 1
