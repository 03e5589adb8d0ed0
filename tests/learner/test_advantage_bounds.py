"""No reward and no penalty makes a normalised advantage larger than its statistics allow, or a deviation of nothing."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.advantages import ESTIMATORS, StepRows
from services.config.tree import AdvantageConfig

STD = sorted(ESTIMATORS.keys() - {"rloo"})
REWARD = st.one_of(
    st.sampled_from([0.0, 1.0, 10.0, 0.1, -0.1, 1e-30, 1e30, 1e150, -1e300, 1e-8]),
    st.floats(-1e300, 1e300, allow_nan=False),
)
EPISODE = st.lists(st.tuples(REWARD, st.integers(0, 2), st.booleans()), min_size=1, max_size=8)
GROUPS = st.lists(st.lists(EPISODE, min_size=2, max_size=6), min_size=1, max_size=3)
CONFIG = st.builds(
    AdvantageConfig,
    episode_statistics=st.sampled_from(["steps", "trajectories"]),
    invalid_action_penalty=st.sampled_from([0.0, 0.1, 1.0, 1e-9, 1e6, 2e9]),
    group_baseline=st.booleans(),
)


def rows_of(groups):
    """Groups of episodes of (reward, state, valid) as step rows."""
    steps = [
        (g, t, k, g * 10 + state, reward, valid)
        for t, (g, episode) in enumerate((g, episode) for g, group in enumerate(groups) for episode in group)
        for k, (reward, state, valid) in enumerate(episode)
    ]
    group, trajectory, step, state, reward, valid = zip(*steps, strict=True)
    return StepRows(*map(np.array, (group, trajectory, step, state)), np.array(reward, dtype=float), np.array(valid))


def normalised_over(name, rows, config, group):
    """Of how many values the episode statistics of a group are."""
    own = np.ones(len(rows), dtype=bool) if name == "reinforce_pp" else rows.group == group
    return own.sum() if config.episode_statistics == "steps" else len(set(rows.trajectory[own].tolist()))


@settings(max_examples=500)
@given(GROUPS, CONFIG)
def test_no_advantage_exceeds_the_root_of_what_it_was_normalised_over(groups, config):
    rows = rows_of(groups)
    for name in STD:
        found = ESTIMATORS[name](rows, config)
        for group in range(len(groups)):
            own = rows.group == group
            assert np.abs(found.episode[own]).max() <= sqrt(normalised_over(name, rows, config, group)), name
        for state in set(rows.step_group.tolist()):
            own = rows.step_group == state
            # G2PO adds what is normalised over the group to what is normalised over the state.
            gain = sqrt((rows.group == rows.group[own][0]).sum()) if name == "g2po" else 0.0
            assert np.abs(found.step[own]).max() <= sqrt(own.sum()) + gain, name


@given(GROUPS, CONFIG)
def test_the_unscaled_penalty_is_what_an_invalid_step_loses(groups, config):
    rows = rows_of(groups)
    unpenalised = config.model_copy(update={"invalid_action_penalty": 0.0})
    unscaled = config.model_copy(update={"penalty": "unscaled", "invalid_action_penalty": 0.25})
    for name, estimator in ESTIMATORS.items():
        without, found = estimator(rows, unpenalised), estimator(rows, unscaled)
        np.testing.assert_array_equal(found.step, without.step, err_msg=name)
        np.testing.assert_array_equal(found.total, without.total - 0.25 * ~rows.valid, err_msg=name)


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([0.1, 0.3, 1 / 3, 1e16, 1e30, -1e30, 1e-30, 7.0]), min_size=1, max_size=9),
    st.randoms(use_true_random=False),
    st.integers(2, 6),
    CONFIG,
)
def test_equal_scores_have_no_deviation_however_they_were_rounded(rewards, random, size, config):
    """Episodes of the same rewards in another order: equal on paper, a bit apart in float64."""
    orders = [random.sample(rewards, len(rewards)) for _ in range(size)]
    rows = rows_of([[[(reward, k, True) for k, reward in enumerate(order)] for order in orders]])
    for name in ("gigpo", "grpo", "dapo", "gspo", "dr_grpo"):
        for normalisation in ("std", "mean"):
            found = ESTIMATORS[name](rows, config.model_copy(update={"normalisation": normalisation}))
            assert np.abs(found.episode).max() < 1e-9, name


def lost(episodes, steps, invalid, reward=0.0):
    """A group whose episodes all have the same score; the steps named in `invalid` are."""
    return [[(reward * (k == steps - 1), k, (m, k) not in invalid) for k in range(steps)] for m in range(episodes)]


@pytest.mark.parametrize("reward", [0.0, 10.0], ids=["all lost", "all won"])
def test_one_invalid_step_where_all_episodes_have_one_score(reward):
    """The published figure over step rows; over trajectories the penalty is not divided by the deviation of nothing."""
    rows = rows_of([lost(8, 50, {(0, 7)}, reward)])
    wrong = int(np.flatnonzero(~rows.valid)[0])
    expected = {("std", "steps"): -19.95, ("mean", "steps"): -0.09975, ("std", "trajectories"): -0.1}
    for (normalisation, statistics), value in expected.items():
        config = AdvantageConfig(normalisation=normalisation, episode_statistics=statistics)
        episode = ESTIMATORS["gigpo"](rows, config).episode
        assert episode[wrong] == pytest.approx(value, abs=0.005)
        assert np.abs(np.delete(episode, wrong)).max() <= 0.051


def test_the_unscaled_penalty_makes_no_unit_variance_of_a_few_invalid_steps():
    """An all-lost group with 2 % invalid steps: scaled, it is as loud as a group that tells won from lost."""
    rows = rows_of([lost(8, 50, {(m, 7 * m) for m in range(8)})])
    scaled = ESTIMATORS["gigpo"](rows, AdvantageConfig())
    unscaled = ESTIMATORS["gigpo"](rows, AdvantageConfig(penalty="unscaled"))
    assert scaled.episode.std(ddof=1) == pytest.approx(1.0, abs=1e-4)
    assert unscaled.total.tolist() == (-0.1 * ~rows.valid).tolist()


def test_a_lone_trajectory_of_the_batch_is_not_divided_by_a_deviation_it_does_not_have():
    rows = rows_of([[[(0.0, 0, True), (0.0, 1, False)]]])
    config = AdvantageConfig(episode_statistics="trajectories")
    assert ESTIMATORS["reinforce_pp"](rows, config).episode.tolist() == [0.0, -0.1]


def test_one_group_of_huge_rewards_leaves_the_signal_of_the_others():
    mixed = [[(0.0, 0, True)], [(10.0, 0, True)]]
    alone = ESTIMATORS["gigpo"](rows_of([mixed]), AdvantageConfig())
    huge = [[(1e300, 0, True)], [(-1e300, 0, True)]]
    together = ESTIMATORS["gigpo"](rows_of([mixed, huge]), AdvantageConfig())
    np.testing.assert_allclose(together.total[:2], alone.total)
    np.testing.assert_allclose(together.episode[2:], [sqrt(0.5), -sqrt(0.5)])


def test_the_default_is_the_published_one():
    config = AdvantageConfig()
    assert (config.episode_statistics, config.normalisation, config.penalty) == ("steps", "std", "scaled")
