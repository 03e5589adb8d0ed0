"""Each estimator against a naive statement of its equations."""

from statistics import mean, stdev

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import ESTIMATORS, StepRows
from learner.advantages.rows import step_returns
from services.config.tree import AdvantageConfig

REWARDS = st.sampled_from([0.0, 1.0, 10.0, 0.25, -0.5])

trajectories = st.lists(
    st.tuples(
        st.integers(0, 2), st.lists(st.tuples(REWARDS, st.integers(0, 3), st.booleans()), min_size=1, max_size=6)
    ),
    min_size=1,
    max_size=8,
)
configs = st.builds(
    AdvantageConfig,
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    omega=st.sampled_from([0.0, 0.5, 1.0]),
    normalisation=st.sampled_from(["std", "mean"]),
    episode_statistics=st.sampled_from(["trajectories", "steps"]),
    invalid_action_penalty=st.sampled_from([0.0, 0.1]),
)


def flat(played):
    return [
        {"g": g, "t": t, "k": k, "r": r, "s": (g, s), "v": v}
        for t, (g, steps) in enumerate(played)
        for k, (r, s, v) in enumerate(steps)
    ]


def arrays(rows):
    keys = sorted({row["s"] for row in rows})
    column = {name: np.array([row[name] for row in rows]) for name in "gtkrv"}
    step_group = np.array([keys.index(row["s"]) for row in rows])
    return StepRows(column["g"], column["t"], column["k"], step_group, column["r"], column["v"])


def relative(value, others, config, lone):
    if len(others) == 1:
        return lone
    return (value - mean(others)) / (stdev(others) + 1e-6 if config.normalisation == "std" else 1.0)


def score(row, rows, config):
    return sum(x["r"] for x in rows if x["t"] == row["t"]) - config.invalid_action_penalty * (not row["v"])


def peers(row, rows, config):
    counted = [x for x in rows if x["g"] == row["g"] and (config.episode_statistics == "steps" or x["k"] == 0)]
    return [score(x, rows, config) for x in counted]


def step_return(row, rows, config):
    later = [x for x in rows if x["t"] == row["t"] and x["k"] >= row["k"]]
    discounted = sum(config.gamma ** (x["k"] - row["k"]) * x["r"] for x in later)
    return discounted - config.invalid_action_penalty * (not row["v"])


def naive_grpo(row, rows, config):
    own, scale = score(row, rows, config), 1 + 1e-6 if config.normalisation == "std" else 1
    return relative(own, peers(row, rows, config), config, own / scale)


def naive_gigpo(row, rows, config):
    returns = [step_return(x, rows, config) for x in rows if x["s"] == row["s"]]
    step = relative(step_return(row, rows, config), returns, config, 0.0)
    return naive_grpo(row, rows, config) + config.omega * step


def naive_rloo(row, rows, config):
    others = peers(row, rows, config)
    own, n = score(row, rows, config), len(others)
    return own if n == 1 else (own - mean(others)) * n / (n - 1)


def agree(name, naive, played, config):
    rows = flat(played)
    ours = ESTIMATORS[name](arrays(rows), config).total
    np.testing.assert_allclose(ours, [naive(row, rows, config) for row in rows], rtol=1e-6, atol=1e-6)


@given(trajectories, configs)
def test_gigpo(played, config):
    agree("gigpo", naive_gigpo, played, config)


@given(trajectories, configs)
def test_grpo(played, config):
    agree("grpo", naive_grpo, played, config)


@given(trajectories, configs)
def test_rloo(played, config):
    agree("rloo", naive_rloo, played, config)


@given(trajectories, configs, st.randoms())
def test_rows_may_stand_in_any_order(played, config, random):
    rows = flat(played)
    shuffled = random.sample(range(len(rows)), len(rows))
    in_order = ESTIMATORS["gigpo"](arrays(rows), config).total
    out_of_order = ESTIMATORS["gigpo"](arrays([rows[i] for i in shuffled]), config).total
    np.testing.assert_allclose(out_of_order, in_order[shuffled], atol=1e-6)


def test_penalty_does_not_reach_earlier_returns():
    rows = flat([(0, [(0.0, 0, True), (0.0, 1, False), (10.0, 2, True)])])
    assert step_returns(arrays(rows), 1.0, 0.1).tolist() == [10.0, 9.9, 10.0]
