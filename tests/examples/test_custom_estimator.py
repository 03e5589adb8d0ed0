"""The estimator of the examples: accepted before a run, right by hand, and described with its parameters."""

from __future__ import annotations

import numpy as np
import pytest

from anchorage.checks.preflight import Start, plugins
from learner.advantages import StepRows, estimator_of
from services.config import Config, load_config
from tests.processes import ROOT

FILE = ROOT / "examples" / "custom_estimator.py"


def config(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "demo.yaml", [f"algorithm={FILE}:half_best", *overrides])


def test_it_passes_the_checks_before_a_run() -> None:
    assert [*plugins(Start(config("advantage.params.alpha=0.25"), trains=True))] == []


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("advantage.params.alpha=2", "advantage.params.alpha: must be <= 1"),
        ("advantage.params.alhpa=0.5", "did you mean alpha?"),
    ],
)
def test_wrong_parameters_are_found_before_a_run(override: str, problem: str) -> None:
    (found,) = plugins(Start(config(override), trains=True))
    assert problem in found


def test_advantages_by_hand() -> None:
    """Group 0: an episode of two steps with score 4, one of one step with score 0. Group 1: scores 1 and 1."""
    rows = StepRows(
        group=np.array([0, 0, 0, 1, 1]),
        trajectory=np.array([0, 0, 1, 2, 3]),
        step=np.array([0, 1, 0, 0, 0]),
        step_group=np.arange(5),
        reward=np.array([1.0, 3.0, 0.0, 1.0, 1.0]),
        valid=np.ones(5, np.bool_),
    )
    own = config("advantage.params.alpha=0.25")
    found = estimator_of(own)(rows, own.advantage)
    # Over the step rows of group 0 the mean is 8/3 and the best score 4: the baseline is 0.75 · 8/3 + 0.25 · 4 = 3.
    np.testing.assert_allclose(found.total, [1.0, 1.0, -3.0, 0.0, 0.0], atol=1e-12)
    np.testing.assert_array_equal(found.step, np.zeros(5))


def test_the_dashboard_is_told_its_parameter() -> None:
    own = config("advantage.params.alpha=0.25")
    estimator = estimator_of(own)
    assert not estimator.has_step_level
    record = estimator.record(own.advantage)
    assert record["title"] == "Half best"
    assert {"term": "α", "meaning": "0.25"} in record["terms"]
