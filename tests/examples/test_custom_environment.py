"""The environment of the examples: fit for training, right by hand, and learned by the policy from its recipe."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

import anchorage
from env_servers.conformance.__main__ import main
from env_servers.environment import Environment, UnknownTask
from env_servers.parameters import with_params
from examples.custom_environment import PLACE_OF, TidyUp
from tests.env_servers.conformance.test_conformance import app_of, running
from tests.processes import ROOT
from tests.tiers import long

RECIPE = ROOT / "examples" / "custom_environment.yaml"


async def test_the_check_finds_it_fit() -> None:
    async with running(app_of(TidyUp)) as url:
        assert await asyncio.to_thread(main, [url, "--tasks", "3", "--steps", "6", "--seconds", "0.05"]) == 0


def test_one_wrong_place_loses_the_episode_but_not_the_other_rewards() -> None:
    game = TidyUp()
    now = game.reset("train", 3, expert=True)
    assert "Your task is to: put all things in their places." in now.text
    assert game.step("tidy up").accepted is False
    rewards = []
    for number in range(4):
        assert now.expert is not None
        wrong = next(action for action in now.admissible or () if action != now.expert)
        now = game.step(wrong if number == 1 else now.expert)
        rewards.append(now.reward)
    assert rewards == [1, 0, 1, 1]
    assert (now.terminated, now.facts["won"]) == (True, False)


def test_tasks_are_sequences_of_different_things() -> None:
    longest: type[Environment] = with_params(TidyUp, {"things": len(PLACE_OF)})
    game = longest()
    now = game.reset("test", 0, expert=True)
    texts = {now.text.splitlines()[-1]}
    while not now.terminated:
        assert now.expert is not None
        now = game.step(now.expert)
        texts.add(now.text)
    assert len(texts) == len(PLACE_OF) + 1
    assert now.facts["won"] is True
    with pytest.raises(UnknownTask):
        TidyUp().reset("train", 10_000)


@long
@pytest.mark.timeout(1200)
def test_the_policy_learns_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "anchorage.cli.main", "train", RECIPE, f"run.dir={tmp_path}"]
    kept = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr
    before, after = anchorage.Run(tmp_path / "tidy_up").evaluations()
    assert after["success_low"] > 0.3 + before["success_high"]
