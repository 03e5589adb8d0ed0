"""Each estimator against a naive statement of its equations, a row at a time."""

import dataclasses
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
    lambda **values: AdvantageConfig(
        **values | {"base_group": values["base_group"] & (values["history_form"] != "paper")}
    ),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    omega=st.sampled_from([0.0, 0.5, 1.0]),
    normalisation=st.sampled_from(["std", "mean"]),
    episode_statistics=st.sampled_from(["trajectories", "steps"]),
    invalid_action_penalty=st.sampled_from([0.0, 0.1]),
    penalty=st.sampled_from(["scaled", "unscaled"]),
    history=st.integers(0, 3),
    history_power=st.sampled_from([0.0, 1.0, 2.0]),
    history_form=st.sampled_from(["published", "paper"]),
    base_group=st.booleans(),
    group_baseline=st.booleans(),
    normalize_distance=st.booleans(),
    episode_weight=st.sampled_from([0.0, 0.5, 1.0]),
    goal_reward=st.sampled_from([1.0, 10.0]),
    step_penalty=st.sampled_from([None, 0.0, 0.5]),
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


def normal(value, values, config, ddof=1):
    """(value − mean) / F; a value that is none of the values is held to the largest that one of them could have."""
    centred = value - mean(values)
    deviation = sqrt(sum((x - mean(values)) ** 2 for x in values) / max(len(values) - ddof, 1))
    if config.normalisation == "mean" or deviation < 1e-9:
        return centred
    bound = (len(values) - 1) / sqrt(len(values) - 1 + ddof)
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

    published = config.history_form == "published"
    advantages, weights = [], []
    if config.base_group:
        advantages.append(naive_grpo(row, rows, config))
        weights.append(1.0)
    for k in range(config.history + 1):
        wanted = context(row, k)
        same = [step_return(x, rows, config) for x in rows if context(x, k) == wanted and wanted is not None]
        if len(same) > 1:
            advantages.append(normal(step_return(row, rows, config), same, config, ddof=0 if published else 1))
            weights.append((k + 1 + published) ** config.history_power)
    if published:
        weights = [w * (abs(a) > 1e-9) for w, a in zip(weights, advantages, strict=True)]
    less = 1e-6 if published else 0.0
    return sum(w * a for w, a in zip(weights, advantages, strict=True)) / (sum(weights) + less) if weights else 0.0


def successor(row, rows):
    """The state that a step led to; None: the trajectory's last step."""
    return next((x["s"] for x in rows if x["t"] == row["t"] and x["k"] == row["k"] + 1), row.get("final"))


def total(row, rows):
    return sum(x["r"] for x in rows if x["t"] == row["t"])


def is_last(row, rows):
    return not any(x["t"] == row["t"] and x["k"] > row["k"] for x in rows)


def way(state, rows, group, seen=()):
    """Fewest steps from a state to the goal, by trying every way; None: there is none."""
    ways = []
    for x in rows:
        if x["g"] != group or x["s"] != state:
            continue
        if is_last(x, rows) and total(x, rows) > 0:
            ways.append(1)
        elif (after := successor(x, rows)) is not None and after not in (*seen, state):
            ways.append(further(way(after, rows, group, (*seen, state))))
    return min((n for n in ways if n is not None), default=None)


def further(steps):
    return None if steps is None else steps + 1


def naive_graphgpo(row, rows, config):
    group = row["g"]
    states = {x["s"] for x in rows if x["g"] == group}
    known = {state: way(state, rows, group) for state in states}
    away = 1 + max((n for n in known.values() if n is not None), default=0)

    def distance(state):
        found = known.get(state)
        return away if found is None else found

    def worth(x):
        there = 0 if is_last(x, rows) and total(x, rows) > 0 else distance(successor(x, rows))
        steps = there - distance(x["s"]) + 1 if config.normalize_distance else there
        return config.goal_reward * config.gamma**steps - penalty(x, config)

    worths = [worth(x) for x in rows if x["s"] == row["s"]]
    step = normal(worth(row), worths, config) if len(worths) > 1 else 0.0
    return config.episode_weight * naive_grpo(row, rows, config) + config.omega * step


def naive_g2po(row, rows, config):
    def value(state):
        visits = [x for x in rows if x["s"] == state]
        return mean([config.gamma ** (length(x) - x["k"]) * total(x, rows) for x in visits])

    def length(x):
        return sum(y["t"] == x["t"] for y in rows)

    def reached(x):
        if is_last(x, rows):
            return config.goal_reward if abs(total(x, rows) - config.goal_reward) < 1e-9 else 0.0
        return value(successor(x, rows))

    def wanted(x):
        return reached(x) - (0.0 if x["v"] else less)

    less = config.invalid_action_penalty if config.step_penalty is None else config.step_penalty
    less *= config.penalty == "scaled"
    same = [wanted(x) for x in rows if x["s"] == row["s"]]
    gains = [reached(x) - value(x["s"]) for x in rows if x["g"] == row["g"]]
    local = normal(wanted(row), same, config)
    gain = normal(reached(row) - value(row["s"]), gains, config)
    return naive_grpo(row, rows, config) + config.omega * (local + gain)


NAIVE = {
    "gigpo": naive_gigpo,
    "grpo": naive_grpo,
    "rloo": naive_rloo,
    "reinforce_pp": naive_reinforce_pp,
    "dr_grpo": naive_grpo,
    "dapo": naive_grpo,
    "gspo": naive_grpo,
    "hgpo": naive_hgpo,
    "graphgpo": naive_graphgpo,
    "g2po": naive_g2po,
}


def test_every_estimator_has_a_naive_statement():
    assert NAIVE.keys() == ESTIMATORS.keys()
    assert PRESETS.keys() <= ESTIMATORS.keys()


@settings(max_examples=400)
@given(trajectories, configs)
def test_every_estimator_is_its_naive_statement(played, config):
    rows = flat(played)
    for name, estimator in ESTIMATORS.items():
        unscaled = config.invalid_action_penalty * (config.penalty == "unscaled")
        theirs = [NAIVE[name](row, rows, config) - unscaled * (not row["v"]) for row in rows]
        np.testing.assert_allclose(estimator(arrays(rows), config).total, theirs, rtol=1e-9, atol=1e-9, err_msg=name)


@settings(max_examples=80)
@given(trajectories, configs, st.lists(st.none() | st.integers(0, 3), min_size=8, max_size=8))
def test_an_episode_may_end_in_a_state_that_others_acted_in(played, config, finals):
    """The last step is an edge too: GraphGPO knows how far a lost episode came."""
    rows = [row | {"final": None if finals[row["t"]] is None else (row["g"], finals[row["t"]])} for row in flat(played)]
    keys = sorted({row["s"] for row in rows} | {row["final"] for row in rows if row["final"] is not None})
    after = [successor(row, rows) for row in rows]
    # Numbered among all states, those in which nobody acted included.
    numbered = dataclasses.replace(
        arrays(rows),
        state=np.array([keys.index(row["s"]) for row in rows]),
        next_state=np.array([-1 if state is None else keys.index(state) for state in after]),
    )
    unscaled = config.invalid_action_penalty * (config.penalty == "unscaled")
    for name in ("graphgpo", "g2po"):
        theirs = [NAIVE[name](row, rows, config) - unscaled * (not row["v"]) for row in rows]
        ours = ESTIMATORS[name](numbered, config).total
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9, err_msg=name)


def test_graphgpo_pays_a_lost_episode_for_coming_nearer():
    """Both took A to B; one won from there, the other went back. Its step to B is worth as much as the winner's."""
    rows = flat([(0, [(0.0, 0, True), (10.0, 1, True)]), (0, [(0.0, 0, True), (0.0, 1, True), (0.0, 0, True)])])
    config = AdvantageConfig(gamma=0.5, normalisation="mean")
    # Worths: A→B 5, B→goal 10, A→B 5, B→A 2.5, and A→? 10 · 0.5³, one further than A.
    step = ESTIMATORS["graphgpo"](arrays(rows), config).step
    np.testing.assert_allclose(step, [1.25, 3.75, 1.25, -3.75, -2.5], atol=1e-9)


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
