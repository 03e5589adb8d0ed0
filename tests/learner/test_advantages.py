"""Each estimator against a naive statement of its equations, a row at a time."""

from math import sqrt

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.advantages import ESTIMATORS, StepRows
from learner.advantages.rows import step_returns
from services.config.presets import PRESETS
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
    penalty=st.sampled_from(["scaled", "unscaled"]),
    history=st.integers(0, 3),
    history_power=st.sampled_from([0.0, 1.0, 2.0]),
    group_baseline=st.booleans(),
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


def mean(values):
    return sum(values) / len(values)


def normal(value, values, config):
    """(value − mean) / F; a value that is none of the values is held to the largest that one of them could have."""
    centred = value - mean(values)
    deviation = sqrt(sum((x - mean(values)) ** 2 for x in values) / max(len(values) - 1, 1))
    if config.normalisation == "mean" or deviation < 1e-9:
        return centred
    bound = (len(values) - 1) / sqrt(len(values))
    return min(bound, max(-bound, centred / (deviation + 1e-6)))


def penalty(row, config):
    return config.invalid_action_penalty * (not row["v"]) * (config.penalty == "scaled")


def score(row, rows, config):
    return sum(x["r"] for x in rows if x["t"] == row["t"]) - penalty(row, config)


def peers(row, rows, config):
    """The scores that the statistics are of: of the step rows, or of the trajectories without penalties."""
    group = [x for x in rows if x["g"] == row["g"]]
    if config.episode_statistics == "steps":
        return [score(x, rows, config) for x in group]
    return [score(x, rows, config) + penalty(x, config) for x in group if x["k"] == 0]


def step_return(row, rows, config):
    later = [x for x in rows if x["t"] == row["t"] and x["k"] >= row["k"]]
    discounted = sum(config.gamma ** (x["k"] - row["k"]) * x["r"] for x in later)
    return discounted - penalty(row, config)


def naive_grpo(row, rows, config):
    own, others = score(row, rows, config), peers(row, rows, config)
    if len(others) == 1:
        return own / (1.0 + 1e-6 if config.normalisation == "std" else 1.0)
    return normal(own, others, config)


def naive_gigpo(row, rows, config):
    returns = [step_return(x, rows, config) for x in rows if x["s"] == row["s"]]
    step = normal(step_return(row, rows, config), returns, config) if len(returns) > 1 else 0.0
    return naive_grpo(row, rows, config) + config.omega * step


def naive_rloo(row, rows, config):
    own, others = score(row, rows, config), peers(row, rows, config)
    if len(others) == 1:
        return own
    # Over step rows the score is one of those that the mean leaves out; over trajectories it is without its penalty.
    less = penalty(row, config) if config.episode_statistics == "trajectories" else 0.0
    return (own + less - mean(others)) * len(others) / (len(others) - 1) - less


def naive_reinforce_pp(row, rows, config):
    def baseline(x):
        return mean(peers(x, rows, config)) if config.group_baseline else 0.0

    groups = {x["g"]: x for x in rows}
    batch = [value - baseline(x) for x in groups.values() for value in peers(x, rows, config)]
    return normal(score(row, rows, config) - baseline(row), batch, config)


def naive_hgpo(row, rows, config):
    def context(x, k):
        """The states of step x and the k before it; None where there are not as many."""
        own = [y["s"] for y in rows if y["t"] == x["t"] and x["k"] - k <= y["k"] <= x["k"]]
        return own if len(own) == k + 1 else None

    advantages, weights = [], []
    for k in range(config.history + 1):
        wanted = context(row, k)
        same = [step_return(x, rows, config) for x in rows if context(x, k) == wanted and wanted is not None]
        if len(same) > 1:
            advantages.append(normal(step_return(row, rows, config), same, config))
            weights.append((k + 1) ** config.history_power)
    return sum(w * a for w, a in zip(weights, advantages, strict=True)) / sum(weights) if weights else 0.0


NAIVE = {
    "gigpo": naive_gigpo,
    "grpo": naive_grpo,
    "rloo": naive_rloo,
    "reinforce_pp": naive_reinforce_pp,
    "dr_grpo": naive_grpo,
    "dapo": naive_grpo,
    "gspo": naive_grpo,
    "hgpo": naive_hgpo,
}


def test_every_estimator_has_a_naive_statement():
    assert NAIVE.keys() == ESTIMATORS.keys()
    assert PRESETS.keys() <= ESTIMATORS.keys()


@settings(max_examples=1000)
@given(trajectories, configs)
def test_every_estimator_is_its_naive_statement(played, config):
    rows = flat(played)
    for name, estimator in ESTIMATORS.items():
        unscaled = config.invalid_action_penalty * (config.penalty == "unscaled")
        theirs = [NAIVE[name](row, rows, config) - unscaled * (not row["v"]) for row in rows]
        np.testing.assert_allclose(estimator(arrays(rows), config).total, theirs, rtol=1e-6, atol=1e-6, err_msg=name)


@given(trajectories, configs, st.randoms())
def test_rows_may_stand_in_any_order_and_have_any_numbers(played, config, random):
    rows = flat(played)
    shuffled = random.sample(range(len(rows)), len(rows))
    renumbered = [rows[i] | {"g": 1000 * rows[i]["g"] - 7, "t": 10**6 * rows[i]["t"] - 3} for i in shuffled]
    for name, estimator in ESTIMATORS.items():
        in_order, out_of_order = (estimator(arrays(each), config).total for each in (rows, renumbered))
        np.testing.assert_allclose(out_of_order, in_order[shuffled], atol=1e-6, err_msg=name)


def test_penalty_does_not_reach_earlier_returns():
    rows = flat([(0, [(0.0, 0, True), (0.0, 1, False), (10.0, 2, True)])])
    assert step_returns(arrays(rows), 1.0, 0.1).tolist() == [10.0, 9.9, 10.0]


def test_one_long_trajectory_among_many_short_ones_takes_no_more_memory():
    """The returns of 3,000 episodes of one step and one of 3,000: not a table of 3,000 × 3,000."""
    import tracemalloc

    trajectory = np.r_[np.arange(3000), np.full(3000, 3000)]
    step = np.r_[np.zeros(3000, dtype=np.int64), np.arange(3000)]
    zeros = np.zeros(6000, dtype=np.int64)
    rows = StepRows(zeros, trajectory, step, zeros, np.ones(6000), np.ones(6000, dtype=np.bool_))
    tracemalloc.start()
    returns = step_returns(rows, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert returns[2999:3003].tolist() == [1.0, 3000.0, 2999.0, 2998.0]
    assert peak < 2**21
