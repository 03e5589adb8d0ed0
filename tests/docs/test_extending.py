"""docs/extending.md is true: its code is one file that passes the checks, and its recipe uses all of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from actors.parsing import ParsedAction
from actors.prompts import PromptBuilder, load_tokenizer
from actors.templates import check as check_prompts
from anchorage.checks.preflight import Start, environment_splits, preflight
from env_servers import registry
from env_servers.protocol import StepResult
from learner.advantages import estimator_of
from learner.advantages.loading import synthetic_rows
from learner.rank.losses import check as check_loss
from services.config import Config, load_config
from services.config.tree import PromptConfig
from services.errors import PreflightFailed
from services.telemetry import open_metrics
from tests.processes import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of the page's recipe, beside the page's code."""
    (tmp_path / "mine.py").write_text("\n\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    recipe = next(text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "extends" in text)
    (tmp_path / "own.yaml").write_text(recipe.replace("demo.yaml", str(ROOT / "configs" / "demo.yaml")))
    return load_config(tmp_path / "own.yaml", [f"run.dir={tmp_path / 'runs'}"])


def test_the_recipe_passes_the_preflight(config: Config) -> None:
    preflight(Start(config, models=(config.model.path,), trains=True))


def test_each_example_does_what_the_page_says(config: Config, tmp_path: Path) -> None:
    estimator, rows = estimator_of(config), synthetic_rows()
    assert estimator.record(config.advantage)["terms"][0] == {"term": "α", "meaning": "0.5"}
    assert np.isfinite(estimator(rows, config.advantage).total).all()
    assert list(check_loss(config.loss)) == []
    prompts = PromptBuilder(config.prompt, load_tokenizer(config.model.path), 1000)
    seen = StepResult.model_validate(
        {"session": "s", "step": 0, "observation": "A desk.", "reward": 0, "terminated": False, "truncated": False}
        | {"admissible": ["look"], "anchor": ""}
    )
    assert prompts.build("Look.", [], seen).text == "You are in a house. Step 1. Goal: Look.\nA desk.\n>"
    assert prompts.parse(" look", ["look"], "as_written") == ParsedAction("look", True)
    transcript = config.prompt.model_copy(update={"template": f"{tmp_path}/mine.py:Transcript", "params": {}})
    assert list(check_prompts(transcript)) == []
    briefing = {"template": f"{tmp_path}/mine.py:Briefing", "reader": "tool", "memory": f"{tmp_path}/mine.py:Summary"}
    assert list(check_prompts(PromptConfig.model_validate(briefing))) == []
    with open_metrics(tmp_path / "run", config.telemetry) as metrics:
        metrics.write(1, {"rollout/success_rate": 0.5})
    assert (tmp_path / "run" / "lines.txt").read_text() == "1 0.5\n"


def test_the_environment_takes_its_parameter(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ENVIRONMENTS", dict(registry.ENVIRONMENTS))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_game.py").write_text((tmp_path / "mine.py").read_text())
    own = {"name": "my_game", "implementation": f"{tmp_path}/my_game.py:MyGame", "params": {"size": 5}}
    assert environment_splits(load_config({"env": own}).env) == {"train": 5}


def test_the_error_on_the_page_is_the_one_that_is_printed(config: Config, tmp_path: Path) -> None:
    wrong = load_config(tmp_path / "own.yaml", ["advantage.params={alpah: 1}", f"run.dir={tmp_path / 'runs'}"])
    with pytest.raises(PreflightFailed) as caught:
        preflight(Start(wrong, trains=True))
    assert f"anchorage: {caught.value}".replace(str(tmp_path), "/home/me") in PAGE
