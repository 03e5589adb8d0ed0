"""`anchorage plan`: its table, its JSON, its fixes and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anchorage.cli.main import app, main
from services.config import load_config

OLDER = ("learner.microbatch_tokens=16384", "learner.activation_checkpointing=false")


def told(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *arguments], prog_name="anchorage", env={"COLUMNS": "160"})
    return result.exit_code, result.output


def test_a_run_that_fits_has_exit_code_0() -> None:
    code, text = told("configs/alfworld.yaml", "--gpus", "2x80")
    assert code == 0
    for part in ("learner rank", "optimizer", "KV cache", "host memory", "disk", "an update", "assumed", "it fits"):
        assert part in text, part


def test_a_run_that_does_not_fit_says_why_and_what_would() -> None:
    code, text = told("configs/alfworld.yaml", "--gpus", "2x80", *OLDER)
    assert code == 1
    assert "does not fit: a learner rank needs" in text
    assert "it fits with these overrides" in text


def test_a_recipe_for_gpus_is_planned_without_any_and_without_its_model() -> None:
    code, text = told("configs/alfworld-7b.yaml")
    assert code == 0
    assert "this machine has no GPU" in text
    assert "8 × 80 GiB" in text


def test_json_has_the_verdict_and_the_figures() -> None:
    code, text = told("configs/alfworld.yaml", "--gpus", "2x80", "--json", *OLDER)
    found = json.loads(text)
    assert code == 1
    assert found["fits"] is False
    assert found["rank"]["total"] > found["gpus"]["usable_bytes"]
    assert found["fixes"]


def test_fixes_become_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    code, text = told("configs/alfworld.yaml", "run.name=mine", *OLDER, "--gpus", "1x24", f"--fix={file}")
    assert code == 1
    assert f"written to {file}" in text
    config = load_config(file)
    assert (config.run.name, config.rollout.share_gpus) == ("mine", True)
    assert told(str(file), "--gpus", "1x24")[0] == 0


def test_fix_without_a_file_prints_overrides() -> None:
    code, text = told("configs/alfworld.yaml", "--fix", "--gpus", "2x80", *OLDER)
    assert code == 1
    assert "  learner." in text


def test_assumptions_can_be_changed() -> None:
    slow = told("configs/alfworld.yaml", "--gpus", "2x80", "--assume", "step_ms=500")[1]
    assert "rollout.episode_timeout_s" in slow
    assert "step_ms=500" in slow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "many"], "--gpus many: must be NUMBERxGIB, as in 4x80"),
        (["--assume", "nothing=1"], "--assume nothing: no such assumption"),
        (["model.path=/no/such/model", "--gpus", "1x80"], "/no/such/model has no config.json"),
        (["--fix=/no/such/folder/a.yaml"], "cannot write /no/such/folder/a.yaml"),
        (["--memory", "inf"], "--memory inf: must be a number of GiB"),
        (["learner.rank=2"], "unknown key"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "configs/alfworld.yaml", *arguments])
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
