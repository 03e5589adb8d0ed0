"""Several calls in one state are one decision: one anchor, one return, one advantage, whatever the estimator."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from learner.advantages import ESTIMATORS, StepRows, estimator_of
from learner.anchors import dense_ids, step_groups
from learner.prepare import prepare, tabulate
from learner.record import group_records
from learner.report import Timings, describe
from learner.signal import figures
from learner.soundness import unusable
from services.archive import GroupArchive, files, numbers_of, read_index
from services.config.tree import Config
from services.control.explorer import group_view, trajectory_view
from services.control.group_index import GroupIndex
from services.schemas import Step, Task, Ticket, Trajectory, VersionSpan
from tests.learner.synthetic import play
from tests.learner.test_advantages import NAIVE

TREES = 200
SETTINGS = [
    {},
    {"normalisation": "mean", "episode_statistics": "trajectories", "gamma": 0.5},
    {"penalty": "unscaled", "omega": 0.5, "history": 1},
]


def call(anchor, reward=0.0, turn=-1, *, trained=True, valid=True, finished=True, tokens=2):
    return Step(
        prompt_ids=np.arange(3, dtype=np.int32),
        response_ids=np.arange(tokens, dtype=np.int32),
        logprobs=np.full(tokens, -0.5, dtype=np.float32),
        versions=(VersionSpan(0, tokens),),
        anchor=anchor,
        observation=f"in {anchor}",
        prompt="",
        response="",
        action=f"leave {anchor}",
        reward=reward,
        valid=valid,
        finished=finished,
        turn=turn,
        trained=trained,
    )


def episode(group, member, steps, size=2, won=False):
    ticket = Ticket(group=group, member=member, group_size=size, task=Task(env="e", split="train", index=0), seed=0)
    return Trajectory(ticket, tuple(steps), {"won": won})


def by_hand():
    """The example in `learner.prepare`."""
    frozen = call("A", trained=False)
    first = [frozen, call("A", turn=0), call("A", turn=0), call("A", turn=0), call("B", 10.0, turn=1)]
    return [[episode(0, 0, first, won=True), episode(0, 1, [call("A")])]]


def configured(algorithm="gigpo", **advantage):
    return Config.model_validate({"algorithm": algorithm, "advantage": advantage, "loss": {"kl_coef": 0.0}})


def test_the_example_by_hand():
    config = configured(gamma=0.5, normalisation="mean")
    update = prepare(by_hand(), config, 0)
    assert update.table.step_group.tolist() == [0, 1, 0]
    assert update.turn.tolist() == [0, 0, 0, 1, 2]
    np.testing.assert_allclose(update.advantages.step, [2.5, 2.5, 2.5, 0, -2.5], atol=1e-9)
    # Over turns: the scores 10, 10 and 0 have the mean 20 / 3.
    np.testing.assert_allclose(update.advantages.episode, [10 / 3] * 4 + [-20 / 3], atol=1e-9)
    np.testing.assert_allclose(update.advantages.total, update.advantages.episode + update.advantages.step, atol=1e-9)
    assert update.rows == 5
    assert update.response_tokens == 10


def test_without_turns_the_same_calls_would_be_discounted():
    """What turns are for: as six decisions, the first of the won episode would be worth 10 · 0.5³."""
    config = configured(gamma=0.5, normalisation="mean")
    (group,) = by_hand()
    alone = [dataclasses.replace(e, steps=tuple(dataclasses.replace(s, turn=-1) for s in e.steps)) for e in group]
    update = prepare([alone], config, 0)
    mean = (1.25 + 2.5 + 5) / 4
    np.testing.assert_allclose(update.advantages.step, [1.25 - mean, 2.5 - mean, 5 - mean, 0, -mean], atol=1e-9)


def random_tree(rng, group, member):
    """An episode whose turns have one to four calls, some untrained calls between, in one of few states."""
    steps = []
    for turn in range(rng.randint(1, 5)):
        state, count = rng.choice("ABC"), rng.randint(1, 4)
        number = turn if count > 1 or rng.random() < 0.5 else -1
        for place in range(count):
            if rng.random() < 0.2:
                steps.append(call(state, 0.25 * rng.randint(0, 1), trained=False, valid=rng.random() < 0.5))
            reward = rng.choice([0.0, 1.0, 10.0]) if place == count - 1 else 0.0
            steps.append(call(state, reward, number, valid=rng.random() < 0.8, tokens=rng.randint(1, 3)))
    return episode(group, member, steps, size=3)


def decisions(groups):
    """The turns as a plain loop finds them, and for each trained call its place among them."""
    rows, of_call = [], []
    for g, group in enumerate(groups):
        for t, played in enumerate(group):
            own, names, early = [], {}, 0.0
            for place, step in enumerate(played.steps):
                if not step.trained:
                    # It belongs to the decision before it; before the first one, to the first.
                    if own:
                        own[-1]["r"] += step.reward
                    else:
                        early += step.reward
                    continue
                name = step.turn if step.turn >= 0 else f"call {place}"
                if name not in names:
                    names[name] = len(own)
                    own.append({"g": g, "t": (g, t), "k": len(own), "r": early, "s": (g, step.anchor), "v": True})
                    early = 0.0
                own[names[name]]["r"] += step.reward
                own[names[name]]["v"] = own[names[name]]["v"] and step.valid
                of_call.append(len(rows) + names[name])
            rows += own
    return rows, of_call


def test_random_call_trees_against_plain_loops():
    rng = random.Random(7)
    configs = [{name: configured(name, **advantage) for name in ESTIMATORS} for advantage in SETTINGS]
    for number in range(TREES):
        groups = [[random_tree(rng, g, m) for m in range(3)] for g in range(1 + number % 2)]
        rows, of_call = decisions(groups)
        for name, config in configs[number % len(configs)].items():
            update, settings = prepare(groups, config, 0), config.advantage
            unscaled = settings.invalid_action_penalty * (settings.penalty == "unscaled")
            theirs = np.array([NAIVE[name](row, rows, settings) - unscaled * (not row["v"]) for row in rows])[of_call]
            np.testing.assert_allclose(update.advantages.total, theirs, rtol=1e-9, atol=1e-9, err_msg=name)
        assert update.rows == len(of_call)
        assert update.step_group_sizes.sum() == len(rows)


def steps_as_before(groups):
    """One row a step, as the learner tabulated them before there were turns."""
    played = [(g, t) for g, group in enumerate(groups) for t in group]
    lengths = [len(t.steps) for _, t in played]
    steps = [step for _, t in played for step in t.steps]
    group = np.repeat([g for g, _ in played], lengths)
    return StepRows(
        group=group,
        trajectory=np.repeat(np.arange(len(played)), lengths),
        step=np.concatenate([np.arange(length) for length in lengths]),
        step_group=step_groups(group, [step.anchor for step in steps]),
        reward=np.array([step.reward for step in steps]),
        valid=np.array([step.valid for step in steps]),
    )


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_steps_that_are_turns_of_their_own_give_the_very_bits_of_before(name):
    groups = [[play(t, steps=1 + t.member % 4) for t in tickets(group)] for group in range(4)]
    config = configured(name)
    before = steps_as_before(groups)
    expected = estimator_of(config)(before, config.advantage)
    named = [[numbered(t) for t in group] for group in groups]
    for same in (groups, named):
        update = prepare(same, config, 3)
        for column in ("group", "trajectory", "step", "step_group", "reward", "valid"):
            ours, theirs = getattr(update.table, column), getattr(before, column)
            assert ours.tobytes() == theirs.astype(ours.dtype).tobytes(), column
        for level in ("episode", "step", "total"):
            assert getattr(update.advantages, level).tobytes() == getattr(expected, level).tobytes()
    one, other = (prepare(same, config, 3).work for same in (groups, named))
    for (ours,), (theirs,) in zip(one, other, strict=True):
        assert (ours.total_tokens, ours.total_rows) == (theirs.total_tokens, theirs.total_rows)
        for a, b in zip(ours.batches, theirs.batches, strict=True):
            assert a.advantage.tobytes() == b.advantage.tobytes()
            assert a.input_ids.tobytes() == b.input_ids.tobytes()


def tickets(group, size=4):
    task = Task(env="alfworld", split="train", index=group)
    return [Ticket(group=group, member=m, group_size=size, task=task, seed=m) for m in range(size)]


def numbered(trajectory):
    steps = tuple(dataclasses.replace(step, turn=5 + 2 * k) for k, step in enumerate(trajectory.steps))
    return dataclasses.replace(trajectory, steps=steps)


def test_a_call_that_was_cut_off_is_ignored_alone():
    config = configured(gamma=0.5, normalisation="mean", ignore_cut_responses=True)
    (group,) = by_hand()
    steps = list(group[0].steps)
    steps[2] = dataclasses.replace(steps[2], finished=False)
    update = prepare([[dataclasses.replace(group[0], steps=tuple(steps)), group[1]]], config, 0)
    assert update.advantages.total[1] == 0
    assert update.advantages.total[0] == update.advantages.total[2] != 0
    assert update.cut_fraction == 1 / 5


def test_reports_count_turns_as_steps_and_calls_as_responses():
    config, (group,) = configured(), by_hand()
    update = prepare([group], config, 0)
    kwargs = {"dropped_stale": 0, "dropped_equal": 0, "dropped_unreadable": 0, "cancelled": 0, "loss": {}}
    report = describe(1, {0: group}, update, timings=Timings(0, 0, 1, 0), **kwargs)
    assert (report.mean_steps, report.rows, report.calls_per_turn) == (1.5, 5, 5 / 3)
    assert report.scalars()["agent/calls_per_turn"] == 5 / 3
    assert report.step_group_sizes == {1: 1, 2: 1}
    seen = figures([group], update.table, {})
    assert (seen.steps, seen.valid, seen.cut, seen.responses, seen.repeated_anchors, seen.counted) == (3, 3, 0, 5, 0, 1)


def test_a_group_of_huge_rewards_is_found_by_its_calls():
    groups = {
        4: by_hand()[0],
        5: [episode(5, 0, [call("A", 1e200, turn=0), call("A", turn=0)]), episode(5, 1, [call("A")])],
    }
    config = configured(normalisation="mean")
    found = unusable(groups, prepare(list(groups.values()), config, 0))
    assert found.keys() == {5}
    assert "1e+200" in found[5]


def test_episodes_without_a_trained_call_have_no_rows():
    groups = [
        [episode(0, 0, [call("A", 1.0, trained=False)]), episode(0, 1, [call("A")]), episode(0, 2, [call("A", 1.0)])]
    ]
    calls = tabulate(groups, Config())
    assert calls.table.trajectory.tolist() == [0, 1]
    update = prepare(groups, configured(), 0)
    assert update.rows == 2
    (record,) = group_records({0: groups[0]}, update, configured())
    assert record.numbers[0].step_group.tolist() == [-1]
    assert np.isnan(record.numbers[0].total).all()


@pytest.fixture
def archived(tmp_path):
    (group,) = by_hand()
    config = configured(gamma=0.5, normalisation="mean")
    GroupArchive(tmp_path, 2**20).append(1, group_records({0: group}, prepare([group], config, 0), config))
    return tmp_path


def test_the_archive_keeps_the_turn_of_each_call(archived):
    (path,) = files(archived)
    numbers = [numbers_of(member) for member in read_index(path).groups[0].members]
    assert [own.turns.tolist() for own in numbers] == [[-1, 0, 0, 0, 1], [0]]
    assert [own.first_calls.tolist() for own in numbers] == [[1, 4], [0]]
    assert numbers[0].step_group.tolist() == [-1, 0, 0, 0, 1]
    np.testing.assert_allclose(numbers[0].returns, [np.nan, 5, 5, 5, 10])


def test_the_explorer_lists_a_turns_calls(archived):
    index = GroupIndex(archived)
    path, summary, entry = index.find(0)
    assert (summary.steps, summary.turns, summary.step_groups, summary.largest_step_group) == (6, 3, 2, 2)
    assert dict(index.step_group_sizes(1)) == {1: {1: 1, 2: 1}}
    view = group_view(path, summary, entry, None)
    assert [(s.state, s.anchor, len(s.steps)) for s in view.states] == [(0, "A", 2), (1, "B", 1)]
    assert [(s.member, s.number, s.calls) for s in view.states[0].steps] == [(0, 0, [1, 2, 3]), (1, 0, [0])]
    assert [(e.source, e.target, e.outcome, e.count) for e in view.edges] == [
        (0, 1, None, 1),
        (1, None, "won", 1),
        (0, None, "lost", 1),
    ]
    told = trajectory_view(path, summary, entry, entry.members[0])
    assert told.summary.turns == 2
    assert [step.turn for step in told.steps] == [None, 0, 0, 0, 1]
    assert [step.state for step in told.steps] == [None, 0, 0, 0, 1]
    assert [step.step_group_size for step in told.steps] == [0, 2, 2, 2, 1]
    assert [step.advantage for step in told.steps][1:4] == [told.steps[1].advantage] * 3


def test_dense_turns_are_numbered_as_the_estimators_see_them():
    groups = [[random_tree(random.Random(n), 0, n) for n in range(3)]]
    calls = tabulate(groups, Config())
    assert dense_ids(calls.turn.tolist()).max() + 1 == len(calls.table)
