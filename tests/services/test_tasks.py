"""Which task a group plays: alone, in a mix, and in an evaluation panel."""

from __future__ import annotations

from collections import Counter

import pytest
from pydantic import ValidationError

from services.config.tree import Config
from services.errors import EnvironmentUnavailable
from services.tasks import MIX_BLOCK, TaskOrder, panel_tasks, shares

SPLITS = {"a/train": 7, "b/train": 5, "c/train": 30, "a/test": 4, "b/valid_seen": 3, "c/test": 9}


def mix(*weights: float, **run: object) -> Config:
    envs = [{"name": name, "weight": weight} for name, weight in zip("abc", weights, strict=False)]
    return Config.model_validate({"envs": envs, "run": run})


def test_a_single_environment_goes_through_each_task_once_an_epoch() -> None:
    order = TaskOrder(Config(), {"train": 5})
    epochs = [[order.task(group).index for group in range(start, start + 5)] for start in (0, 5, 10)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3, 4]] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_mix_keeps_its_shares_and_each_environments_epochs() -> None:
    order = TaskOrder(mix(1, 2, 1), SPLITS)
    tasks = [order.task(group) for group in range(3 * MIX_BLOCK)]
    for block in range(3):
        count = Counter(task.env for task in tasks[block * MIX_BLOCK : (block + 1) * MIX_BLOCK])
        assert count == {"a": 25, "b": 50, "c": 25}
    for name, size in (("a", 7), ("b", 5), ("c", 30)):
        played = [task.index for task in tasks if task.env == name]
        for start in range(0, len(played) - size, size):
            assert sorted(played[start : start + size]) == list(range(size))


def test_any_group_can_be_asked_for_at_any_time() -> None:
    forwards = TaskOrder(mix(3, 1), SPLITS)
    expected = [forwards.task(group) for group in range(450)]
    backwards = TaskOrder(mix(3, 1), SPLITS)
    assert [backwards.task(group) for group in reversed(range(450))] == expected[::-1]
    other = TaskOrder(mix(3, 1, seed=1), SPLITS)
    assert [other.task(group) for group in range(450)] != expected


def test_shares_are_whole_and_add_up() -> None:
    assert shares([1, 1, 1]) == [34, 33, 33]
    assert shares([0.5, 99.5]) == [1, 99]
    assert shares([2.0]) == [MIX_BLOCK]


def test_the_first_tasks_of_an_environment_alone() -> None:
    config = Config.model_validate({"envs": [{"name": "c", "tasks": 3}, {"name": "a"}]})
    order = TaskOrder(config, SPLITS)
    assert {task.index for task in map(order.task, range(200)) if task.env == "c"} == {0, 1, 2}


def test_a_panel_holds_every_environments_own_held_out_split() -> None:
    config = mix(1, 1)
    panel = panel_tasks(config, SPLITS)
    assert {(task.env, task.split) for task in panel} == {("a", "test"), ("b", "valid_seen")}
    assert [task.index for task in panel if task.env == "a"] == [0, 1, 2, 3]
    assert [task.index for task in panel if task.env == "b"] == [0, 1, 2]


def test_panels_have_no_task_in_common() -> None:
    config = Config.model_validate({"evaluation": {"episodes": 3, "panels": 3}})
    assert [task.index for task in panel_tasks(config, {"test": 9})] == list(range(9))
    with pytest.raises(EnvironmentUnavailable, match=r"3 panels of 3 take 9 different tasks, .* has 8"):
        panel_tasks(config, {"test": 8})


def test_mistakes() -> None:
    with pytest.raises(EnvironmentUnavailable, match="b has no tasks in split 'b/train'; it offers a/train"):
        TaskOrder(mix(1, 1), {"a/train": 3})
    with pytest.raises(ValidationError, match="names must be unique"):
        Config.model_validate({"envs": [{"name": "a"}, {"name": "a"}]})
    with pytest.raises(ValidationError, match="at least 1 % of their sum"):
        mix(1, 1000)
    with pytest.raises(ValidationError, match="not both"):
        Config.model_validate({"env": {"url": "http://a", "urls": ["http://b"]}})
