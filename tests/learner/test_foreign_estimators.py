"""Estimators from outside: the same door, checked before anything starts, described by themselves."""

import json
from textwrap import dedent

import numpy as np
import pytest

from anchorage.checks import preflight
from learner.advantages import ESTIMATORS, describe, load_estimator
from learner.advantages.loading import BUILT_IN, check, synthetic_rows
from learner.record import record_algorithm
from services.config import Config
from services.config.presets import ALGORITHMS
from services.plugins import PluginError

HALF = """
    import numpy as np
    from learner.advantages import Advantages, episode_scores, moments
    from pydantic import BaseModel

    class Params(BaseModel):
        alpha: float = 0.5

    def mine(rows, config, params: Params):
        \"\"\"The score less the mean of its group, times alpha.

        More of it.
        \"\"\"
        scores = episode_scores(rows, config.invalid_action_penalty)
        total = params.alpha * (scores - moments(scores, rows.group).row_mean)
        return Advantages(episode=total, step=np.zeros(len(rows)), total=total)
"""


def config(folder, text, **advantage):
    (folder / "mine.py").write_text(dedent(text))
    return Config.model_validate({"algorithm": f"{folder}/mine.py:mine", "advantage": advantage})


def returning(what, imports="import numpy as np\nfrom learner.advantages import Advantages\n"):
    return f"{imports}def mine(rows, config):\n    zeros = np.zeros(len(rows))\n    return {what}\n"


def test_ten_lines_are_an_estimator(tmp_path):
    own = config(tmp_path, HALF, params={"alpha": 0.25}, normalisation="mean")
    assert list(check(own)) == []
    rows = synthetic_rows()
    found = load_estimator(own.algorithm, own.advantage.params)(rows, own.advantage)
    np.testing.assert_allclose(found.total, ESTIMATORS["grpo"](rows, own.advantage).total / 4)


def test_the_unscaled_penalty_is_applied_to_it_too(tmp_path):
    own = config(tmp_path, HALF, penalty="unscaled", invalid_action_penalty=3.0)
    rows = synthetic_rows()
    estimator = load_estimator(own.algorithm)
    free = own.advantage.model_copy(update={"invalid_action_penalty": 0.0})
    np.testing.assert_allclose(estimator(rows, own.advantage).total, estimator(rows, free).total - 3.0 * ~rows.valid)


def test_without_a_description_it_is_explained_by_its_docstring(tmp_path):
    own = config(tmp_path, HALF)
    record = load_estimator(own.algorithm).record(own.advantage)
    assert (record["title"], record["step_level"], record["parameters"]) == ("mine", False, {"alpha": 0.5})
    assert record["terms"] == [{"term": "mine", "meaning": "The score less the mean of its group, times alpha."}]


def test_a_description_is_filled_in_from_parameters_and_settings(tmp_path):
    @describe(
        "Mine", step={"A_S = α R_t": "by state"}, terms={"α": "{alpha:g} of {gamma:g}", "none": lambda config: ""}
    )
    def estimator(rows, config): ...

    record = estimator.description.record(Config().advantage, {"alpha": 0.5})
    assert record["formulas"] == [{"level": "step", "formula": "A_S = α R_t", "meaning": "by state"}]
    assert (record["step_level"], record["terms"]) == (True, [{"term": "α", "meaning": "0.5 of 0.95"}])


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_ones_come_through_the_same_door(tmp_path, name):
    own = Config(algorithm=name)
    assert list(check(own)) == []
    record_algorithm(tmp_path, own)
    record = json.loads((tmp_path / "algorithm.json").read_text())
    assert record["algorithm"] == name
    assert record["title"] != name
    assert record["step_level"] is any(formula["level"] == "step" for formula in record["formulas"])
    # What it says of its step level is what it does.
    assert record["step_level"] is bool(np.any(ESTIMATORS[name](synthetic_rows(), own.advantage).step))


def test_names_in_the_configuration_are_those_of_the_registry():
    assert tuple(BUILT_IN) == ALGORITHMS


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (returning("zeros"), "must return learner.advantages.Advantages, got ndarray"),
        (returning("Advantages(zeros, zeros, zeros[1:])"), "total must be float64 [18], got float64 [17]"),
        (returning("Advantages(zeros, zeros, zeros.astype('f4'))"), "total must be float64 [18], got float32 [18]"),
        (returning("Advantages(zeros, zeros, list(zeros))"), "total must be a float64 array of 18 rows, got list"),
        (returning("Advantages(zeros, zeros, zeros / 0)"), "total is not finite for 18 rows"),
        (returning("Advantages(zeros, zeros, rows.reward)"), "total shares its memory with rows.reward; return a copy"),
        (returning("Advantages(zeros, zeros, zeros + rows.reward.sort())"), "TypeError"),
        (
            "import numpy as np\nfrom learner.advantages import Advantages\n"
            "def mine(rows, config):\n    rows.reward[:] = 1\n"
            "    return Advantages(np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(rows)))\n",
            "it changes rows.reward; copy it first",
        ),
        (returning("no_such_name"), "NameError: name 'no_such_name' is not defined (mine.py:5)"),
        (
            "from learner.advantages import describe, ESTIMATORS\n"
            "@describe('Mine', terms={'x': '{alpah}'})\n"
            "def mine(rows, config):\n    return ESTIMATORS['grpo'](rows, config)\n",
            "its description: KeyError: 'alpah'",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_wrong_is_one_line_of_the_preflight(tmp_path, text, line):
    own = config(tmp_path, text)
    with pytest.raises(preflight.PreflightFailed) as caught:
        preflight.preflight(preflight.Start(own.model_copy(update={"run": Config().run}), trains=True))
    [found] = [one for one in str(caught.value).splitlines() if one.startswith("algorithm=")]
    assert line in found


def test_what_it_raises_in_a_run_is_one_line(tmp_path):
    own = config(tmp_path, returning("1 / 0"))
    with pytest.raises(PluginError, match=r"algorithm=\S+: ZeroDivisionError: division by zero \(mine.py:5\)"):
        load_estimator(own.algorithm)(synthetic_rows(), own.advantage)
