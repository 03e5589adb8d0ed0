"""Figures of agent programs in the report of an update."""

from dataclasses import replace

import pytest

from learner.agents import agent_scalars
from learner.prepare import prepare
from learner.report import Timings, describe
from tests.learner.test_turns import by_hand, call, configured, episode

ABOUT = {"cause": "done", "calls": 6, "follows": 4, "extended": 3, "unreadable": 1, "refused": 2, "orphaned": 1}


def told(trajectory, **about):
    return replace(trajectory, facts={**trajectory.facts, "agent": {**ABOUT, **about}})


def test_figures_are_of_the_episodes_that_agents_played():
    [[first, second]] = by_hand()  # five calls, one of them frozen, in two turns; one call in one turn
    found = agent_scalars([told(first, failures=3), told(second, cause="crash", calls=1, follows=0, extended=0), first])
    assert found["agent/calls"] == 3.5
    assert found["agent/turns"] == 1.5
    assert found["agent/frozen_fraction"] == 1 / 6
    assert found["agent/extended_fraction"] == 3 / 4
    assert found["agent/unreadable_fraction"] == 2 / 7
    assert (found["agent/refused"], found["agent/orphaned"], found["agent/failed_attempts"]) == (4, 2, 3)
    assert found["agent/truncated_fraction"] == found["agent/truncated_crash"] == 1 / 2
    assert found["agent/truncated_timeout"] == 0


def test_states_of_which_little_was_told_are_counted_by_turns():
    curt, long = call("A", turn=0), replace(call("B", turn=1), observation="You are in a kitchen.")
    group = [told(episode(0, 0, [curt, curt, long])), told(episode(0, 1, [long]))]
    assert agent_scalars(group)["agent/short_anchor_fraction"] == 1 / 3


@pytest.mark.parametrize("facts", [{}, {"agent": "a spy"}, {"agent": {"name": "007"}}], ids=str)
def test_an_environments_own_facts_are_no_agents(facts):
    [[first, _]] = by_hand()
    assert agent_scalars([replace(first, facts=facts)]) == {}


def test_the_figures_are_in_the_updates_record():
    [[first, second]] = by_hand()
    group = [told(first), told(second)]
    kwargs = {"dropped_stale": 0, "dropped_equal": 0, "dropped_unreadable": 0, "cancelled": 0, "loss": {}}
    update = prepare([group], configured(), 0)
    record = describe(1, {0: group}, update, timings=Timings(0, 0, 1, 0), **kwargs).scalars()
    assert agent_scalars(group).items() <= record.items()
    assert record["agent/calls_per_turn"] == 5 / 3
