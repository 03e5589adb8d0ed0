"""Whole runs on the real parts, with what kills them: Ctrl-C, kill -9 of the learner, of its ranks, of an actor."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.processes import Command
from tests.tiers import long

pytestmark = pytest.mark.timeout(1800)  # on a busy machine; a quiet one takes two minutes

UPDATES = 8
SMALL = [
    "configs/demo.yaml",
    "run.name=small",
    f"learner.updates={UPDATES}",
    "learner.groups_per_update=2",
    "learner.group_size=4",
    "rollout.lease_s=5",
    "env.max_steps=8",
    "checkpoint.every=2",
]
START_S = 600
END_S = 600


def ledger(folder: Path) -> list[dict[str, object]]:
    path = folder / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def updates_done(folder: Path) -> int:
    return max((int(str(entry["update"])) for entry in ledger(folder)), default=0)


def assert_each_group_trained_once(folder: Path) -> None:
    entries = ledger(folder)
    assert Counter(entry["update"] for entry in entries) == dict.fromkeys(range(1, UPDATES + 1), 2)
    assert sorted(int(str(entry["group"])) for entry in entries) == list(range(2 * UPDATES))
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, UPDATES + 1))


def test_killed_learner_resumes_with_nothing_lost_or_trained_twice(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    with Command(["train", *SMALL, f"run.dir={tmp_path}"]) as command:
        command.wait_for(lambda: updates_done(folder) >= 3, START_S)
        command.kill()
        command.wait_until_gone()
    done = updates_done(folder)
    assert 3 <= done < UPDATES
    with Command(["train", *SMALL, f"run.dir={tmp_path}", "--resume"]) as command:
        code, _, err = command.finish(END_S)
        command.wait_until_gone()
    assert code == 0, err
    assert_each_group_trained_once(folder)
    assert_its_policy_can_be_evaluated(folder)


def assert_its_policy_can_be_evaluated(folder: Path) -> None:
    """vLLM serves the checkpoint's folder, and without a recipe the policy is asked as it was trained."""
    figures = folder.parent / "eval.json"
    options = ["--policy", str(folder), "--episodes", "2", "--seeds", "2", "--json", str(figures)]
    with Command(["eval", *options]) as command:
        code, _, err = command.finish(END_S)
        command.wait_until_gone()
    assert code == 0, err
    result = json.loads(figures.read_text())[str(folder)]
    assert (result["success"]["episodes"], result["complete"], result["cancelled"]) == (4, True, 0)
    # The starter knows the language: with another template, or its responses cut, hardly an action would be valid.
    assert result["valid_fraction"] > 0.5


@long
def test_killed_actor_and_killed_rank_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    with Command(["train", *SMALL, f"run.dir={tmp_path}"]) as command:
        command.wait_for(lambda: updates_done(folder) >= 1, START_S)
        for process in command.titled("ray::RolloutProcess"):
            process.kill()
        at = updates_done(folder)
        command.wait_for(lambda: updates_done(folder) >= at + 1, START_S)
        for process in command.titled("ray::Rank"):
            process.kill()
        code, _, err = command.finish(END_S)
        command.wait_until_gone()
    assert code == 0, err
    assert "died" in err
    assert_each_group_trained_once(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=long)])
def test_a_signal_leaves_a_checkpoint_and_no_process(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "small"
    with Command(["train", *SMALL, f"run.dir={tmp_path}", "checkpoint.every=100"]) as command:
        command.wait_for(lambda: updates_done(folder) >= 1, START_S)
        command.stop(number)
        code, _, err = command.finish(END_S)
        command.wait_until_gone()
    assert code == 130, err
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert int(checkpoint.name) == updates_done(folder)
    assert (checkpoint / "policy" / "model.safetensors").is_file()
