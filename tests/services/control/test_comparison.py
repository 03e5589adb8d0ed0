"""A kept group by every estimator: the run's own column is what it was trained with; how far the others are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from learner.advantages import ESTIMATORS
from learner.comparison import compare
from learner.prepare import prepare
from services.config.tree import Config
from services.control.app import create_app
from services.control.comparison import correlation
from services.control.settings import ControlSettings
from tests.control_runs import GROUP_SIZE, make_finished, play_group
from tests.control_server import ADMIN


@pytest.fixture
def comparing(tmp_path: Path) -> Iterator[TestClient]:
    for algorithm in ("gigpo", "reinforce_pp", "graphgpo"):
        make_finished(tmp_path / "runs", algorithm.replace("_", "-"), updates=2, algorithm=algorithm)
    settings = ControlSettings(runs=tmp_path / "runs", admin_token=SecretStr(ADMIN), requests_per_minute=10_000)
    with TestClient(create_app(settings, compare), headers={"Authorization": f"Bearer {ADMIN}"}) as client:
        yield client


def ask(client: TestClient, run: str, group: int) -> Any:
    response = client.get(f"/api/v1/runs/{run}/groups/{group}/comparison")
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("run", ["gigpo", "reinforce-pp", "graphgpo"])
def test_the_runs_own_estimator_says_what_was_trained(comparing: TestClient, run: str) -> None:
    found = ask(comparing, run, 3)
    names = [one["name"] for one in found["estimators"]]
    assert names == list(ESTIMATORS)
    place = names.index(found["algorithm"])
    recorded = [turn["recorded"] for turn in found["turns"]]
    np.testing.assert_allclose([turn["advantages"][place] for turn in found["turns"]], recorded, atol=1e-12)
    own = found["estimators"][place]
    assert own["correlation"] == pytest.approx(1.0)
    assert own["opposite"] == 0
    assert own["deviation"] == pytest.approx(found["deviation"])


def test_turns_and_correlations_are_those_of_plain_sums(comparing: TestClient) -> None:
    found = ask(comparing, "gigpo", 2)
    episodes = play_group(2, 1)
    assert [turn["action"] for turn in found["turns"]] == [step.action for e in episodes for step in e.steps]
    assert {turn["member"] for turn in found["turns"]} == set(range(GROUP_SIZE))
    table = np.array([turn["advantages"] for turn in found["turns"]])
    varies = np.flatnonzero(table.std(axis=0) > 1e-8)
    plain = np.corrcoef(table[:, varies].T)
    told = np.array(found["correlations"], dtype=float)
    np.testing.assert_allclose(told[np.ix_(varies, varies)], plain, atol=1e-9)
    assert np.isnan(told).sum() == told.size - len(varies) ** 2
    names = [one["name"] for one in found["estimators"]]
    assert table[:, names.index("gigpo")].std() > 0
    assert found["correlations"][names.index("gigpo")][names.index("gigpo")] == pytest.approx(1.0)


def test_an_algorithms_preset_counts_and_the_runs_settings_otherwise() -> None:
    config = Config.model_validate({"advantage": {"gamma": 0.7}, "learner": {"group_size": GROUP_SIZE}})
    groups = [play_group(0, 0), play_group(1, 0)]
    found = compare(config, groups, 1)
    for name, gamma in (("gigpo", 0.7), ("graphgpo", 0.1)):
        own = Config.model_validate({"algorithm": name, "advantage": {"gamma": gamma}})
        update = prepare(groups, own, 0)
        of_group = update.table.group[update.turn] == 1
        np.testing.assert_allclose(found[name], update.advantages.total[of_group], atol=1e-12)


def test_without_estimators_or_a_group_it_says_so(api: TestClient, comparing: TestClient) -> None:
    refused = api.get("/api/v1/runs/finished/groups/3/comparison")
    assert refused.status_code == 409
    assert "no estimators" in refused.json()["detail"]
    assert comparing.get("/api/v1/runs/gigpo/groups/999/comparison").status_code == 404


def test_a_constant_correlates_with_nothing() -> None:
    rising = np.arange(4.0)
    assert correlation(rising, np.ones(4)) is None
    assert correlation(rising, -rising) == pytest.approx(-1.0)
    assert correlation(np.zeros(0), np.zeros(0)) is None
