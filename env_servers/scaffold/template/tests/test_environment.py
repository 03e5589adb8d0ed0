"""Tests the rules of the environment, and that its server passes the conformance check."""

import asyncio
import sys
from pathlib import Path

import pytest
from my_environment.environment import SPLITS, MyEnvironment

from env_servers.conformance.run import Options, check_server
from env_servers.environment import UnknownTask
from env_servers.launch import start_server
from env_servers.parameters import with_params


@pytest.mark.parametrize("index", range(10))
def test_the_expert_wins(index: int) -> None:
    environment = MyEnvironment()
    seen = environment.reset("train", index, expert=True)
    for _ in range(5):
        assert seen.expert is not None
        seen = environment.step(seen.expert)
        if seen.terminated:
            break
    assert (seen.terminated, seen.reward, seen.facts["won"]) == (True, 1.0, True)


def test_a_task_starts_the_same_every_time() -> None:
    assert MyEnvironment().reset("train", 3) == MyEnvironment().reset("train", 3)


def test_a_parameter_changes_the_tasks_and_the_fingerprint() -> None:
    larger = with_params(MyEnvironment, {"highest": 50})
    assert "between 1 and 50" in larger().reset("train", 0).text
    assert larger.about() != MyEnvironment.about()


@pytest.mark.parametrize("action", ["", "jump", "guess", "guess x", "guess 99999", "guess ²"])
def test_an_invalid_action_changes_nothing(action: str) -> None:
    environment = MyEnvironment()
    before = environment.reset("train", 0)
    after = environment.step(action)
    assert (after.state, after.terminated, after.reward) == (before.state, False, 0.0)


@pytest.mark.parametrize(("split", "index"), [("train", SPLITS["train"]), ("nowhere", 0)])
def test_unknown_tasks_are_rejected(split: str, index: int) -> None:
    with pytest.raises(UnknownTask):
        MyEnvironment().reset(split, index)


def test_the_server_passes_the_check(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    serve = [sys.executable, "-m", "env_servers", "my_environment.environment:MyEnvironment"]
    with start_server([*serve, "--port", "0", "--max-sessions", "64", "--ready-file", str(ready)], ready) as server:
        report = asyncio.run(check_server(server.url, options=Options(seconds=0.5)))
    assert report.fit, [finding for finding in report.findings if finding.verdict == "fail"]
