"""Evaluation without a model: baselines, the table, its files, and what is no policy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console

from services.buffer import Buffer
from services.cli.evaluate import _SoFar, evaluation_config, run_evaluation
from services.config.tree import BufferConfig
from services.errors import EnvironmentUnavailable, ModelUnavailable
from services.schemas import Task, Ticket
from tests.control_runs import play

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "configs" / "demo.yaml"


@pytest.mark.parametrize(("env", "least"), [("alfworld", 0.9), ("webshop", 0.9)])
def test_chance_and_the_expert_on_the_same_panels(env: str, least: float, tmp_path: Path) -> None:
    overrides = [f"env.name={env}", "env.max_steps=30", "evaluation.episodes=30", "evaluation.panels=2"]
    config = evaluation_config(DEMO, overrides, [])
    console = Console(record=True, width=200)
    figures, page = tmp_path / "eval.json", tmp_path / "eval.md"
    assert run_evaluation(config, ["random", "expert"], json_file=figures, markdown_file=page, console=console)
    written = json.loads(figures.read_text())
    assert written["expert"]["success"]["rate"] >= least
    assert written["random"]["success"]["rate"] < 0.2
    assert [panel["episodes"] for panel in written["expert"]["panels"]] == [30, 30]
    assert written["random"]["valid_fraction"] == 1.0
    assert written["expert"]["score"]["mean"] >= written["expert"]["success"]["rate"]
    rows = [line.split("|") for line in page.read_text().splitlines()]
    assert {len(row) for row in rows} == {5}
    assert "all tasks" in page.read_text()
    assert "all tasks" in console.export_text()


def test_a_run_brings_its_own_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: mine}\nenv: {max_steps: 7}\n")
    config = evaluation_config(None, ["evaluation.episodes=3"], ["random", str(tmp_path)])
    assert (config.run.name, config.env.max_steps, config.evaluation.episodes) == ("mine-eval", 7, 3)


def test_what_is_no_policy_is_refused_before_anything_is_played(tmp_path: Path) -> None:
    config = evaluation_config(DEMO, [], [])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for policy, reason in ((tmp_path / "nothing", "nothing"), (tmp_path / "run", "no checkpoint yet")):
        with pytest.raises(ModelUnavailable, match=reason):
            run_evaluation(config, ["random", str(policy)], json_file=None, markdown_file=None, console=Console())
    config = evaluation_config(DEMO, ["evaluation.split=nowhere"], [])
    with pytest.raises(EnvironmentUnavailable, match="nowhere"):
        run_evaluation(config, ["expert"], json_file=None, markdown_file=None, console=Console())


def test_an_evaluation_tells_its_success_so_far(redis_url: str, run_name: str) -> None:
    buffer = Buffer.connect(redis_url, run_name, BufferConfig())
    try:
        task = Task(env="alfworld", split="test", index=0)
        buffer.issue([Ticket(stream="panel", group=n, member=0, group_size=1, task=task, seed=n) for n in range(4)])
        so_far = _SoFar(buffer, "panel")
        buffer.heartbeat("one", {"tokens_per_s": 400.0}, 600.0)
        buffer.heartbeat("two", {"tokens_per_s": 100.5}, 600.0)
        buffer.heartbeat("new", {}, 600.0)
        assert so_far.text() == "no episode ended yet  500 tok/s"
        for number, ticket in enumerate(buffer.lease("one", 4, 600.0)):
            episode = play(ticket, 0)
            buffer.store(dataclasses.replace(episode, facts={**episode.facts, "won": number == 0}))
            assert so_far.text() == f"success so far {1 / (number + 1):.2f}  500 tok/s"
    finally:
        buffer.close()
