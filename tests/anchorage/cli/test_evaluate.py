"""Evaluation without a model: baselines, the table, its files, and what is no policy."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from anchorage.cli.evaluate import run_evaluation
from anchorage.runs.evaluation import SuccessSoFar, evaluation_config, model_of
from services import manifest
from services.buffer import Buffer
from services.config import ConfigError
from services.config.tree import BufferConfig
from services.errors import FolderDamaged, ModelUnavailable, PreflightFailed
from services.schemas import Task, Ticket
from services.tasks import panel_tasks
from tests.control_runs import play

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "configs" / "demo.yaml"


def test_each_of_several_splits_is_a_column_and_a_result_of_its_own(tmp_path: Path) -> None:
    overrides = ["evaluation.episodes=4", "env.max_steps=30", "evaluation.split=[valid_seen, valid_unseen]"]
    config = evaluation_config(DEMO, overrides, [])
    console = Console(record=True, width=200)
    figures = tmp_path / "eval.json"
    run_evaluation(config, ["expert"], json_file=figures, markdown_file=None, console=console)
    table = console.export_text()
    assert "expert, valid_seen" in table
    assert "expert, valid_unseen" in table
    result = json.loads(figures.read_text())["expert"]
    assert result["splits"].keys() == {"valid_seen", "valid_unseen"}
    assert [part["success"]["episodes"] for part in result["splits"].values()] == [4, 4]
    assert result["success"]["episodes"] == 8


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


def test_a_policy_without_a_recipe_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    starter = evaluation_config(None, ["env.max_steps=9"], ["expert", "models/starter"])
    assert (starter.prompt.template, starter.model.max_response_tokens, starter.env.max_steps) == ("compact", 12, 9)
    assert evaluation_config(None, [], []).prompt == starter.prompt  # of model.path

    run = tmp_path / "mine"
    for folder in ("checkpoints/000002/policy", "checkpoints/best-000002", "export"):
        (run / folder).mkdir(parents=True)
        (run / folder / "warmstart.json").write_text('{"config": "model: {max_response_tokens: 3}"}')
    (run / "config.yaml").write_text("run: {name: mine}\nmodel: {max_response_tokens: 99}\n")
    for policy, wanted in (("checkpoints/000002", 99), ("checkpoints/best-000002", 99), ("export", 3)):
        assert evaluation_config(None, [], [str(run / policy)]).model.max_response_tokens == wanted
    assert evaluation_config(None, [], [str(run / "checkpoints/000002/policy")]).run.name == "mine-eval"
    assert evaluation_config(None, [], ["random"]).run.name == "run-eval"
    with pytest.raises(ConfigError, match=r"is no run .* give a recipe"):
        evaluation_config(None, [], ["random", str(tmp_path)])


def test_one_of_several_environments_can_be_chosen(tmp_path: Path) -> None:
    recipe = tmp_path / "mix.yaml"
    recipe.write_text("envs: [{name: alfworld, max_steps: 3}, {name: webshop, max_steps: 4}]\n")
    config = evaluation_config(recipe, [], [], env="webshop")
    assert [(env.name, env.max_steps) for env in config.environments] == [("webshop", 4)]
    assert {task.env for task in panel_tasks(config, {"test": 200})} == {"webshop"}
    with pytest.raises(ConfigError, match="no environment 'shop' in this run; its environments are alfworld, webshop"):
        evaluation_config(recipe, [], [], env="shop")
    assert evaluation_config(DEMO, [], [], env="webshop").env.name == "webshop"


def test_several_seeds_of_the_same_tasks(tmp_path: Path) -> None:
    overrides = ["env.max_steps=30", "evaluation.episodes=10", "evaluation.seeds=3", "evaluation.panels=2"]
    figures, console = tmp_path / "eval.json", Console(record=True, width=200)
    config = evaluation_config(DEMO, overrides, [])
    assert run_evaluation(config, ["expert"], json_file=figures, markdown_file=None, console=console)
    expert = json.loads(figures.read_text())["expert"]
    assert [rate["episodes"] for rate in expert["seeds"]] == [20, 20, 20]
    assert [rate["episodes"] for rate in expert["panels"]] == [30, 30]
    # The expert does the same each time: three times the episodes tell no more than the tasks do.
    assert expert["success"]["episodes"] == 60
    assert expert["success"]["effective_episodes"] == pytest.approx(20)
    assert "seeds, mean ± deviation" in console.export_text()


def test_what_is_no_policy_is_refused_before_anything_is_played(tmp_path: Path) -> None:
    config = evaluation_config(DEMO, [], [])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for policy, reason in ((tmp_path / "nothing", "nothing"), (tmp_path / "run", "no checkpoint yet")):
        with pytest.raises(ModelUnavailable, match=reason):
            run_evaluation(config, ["random", str(policy)], json_file=None, markdown_file=None, console=Console())
    config = evaluation_config(DEMO, ["evaluation.panels=3"], [])
    with pytest.raises(PreflightFailed, match=r"3 panels of 256 take 768 different tasks, .* has 256"):
        run_evaluation(config, ["expert"], json_file=None, markdown_file=None, console=Console())
    config = evaluation_config(DEMO, ["evaluation.split=nowhere"], [])
    with pytest.raises(PreflightFailed, match="nowhere"):
        run_evaluation(config, ["expert"], json_file=None, markdown_file=None, console=Console())


def test_the_newest_intact_checkpoint_of_a_run_is_evaluated(tmp_path: Path) -> None:
    for version in (2, 4):
        folder = tmp_path / "run" / "checkpoints" / f"{version:06d}"
        shutil.copytree("models/starter", folder / "policy")
        manifest.write(folder, {"kind": "checkpoint", "run": "run", "update": version, "ranks": 1})
    assert model_of(str(tmp_path / "run")) == folder / "policy"
    (folder / "policy" / "config.json").write_text("{}")
    assert model_of(str(tmp_path / "run")) == folder.with_name("000002") / "policy"
    with pytest.raises(FolderDamaged, match=r"policy/config\.json has 2 bytes"):
        model_of(str(folder))


def test_an_evaluation_tells_its_success_so_far(redis_url: str, run_name: str) -> None:
    buffer = Buffer.connect(redis_url, run_name, BufferConfig())
    try:
        task = Task(env="alfworld", split="test", index=0)
        buffer.issue([Ticket(stream="panel", group=n, member=0, group_size=1, task=task, seed=n) for n in range(4)])
        so_far = SuccessSoFar(buffer, "panel")
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
