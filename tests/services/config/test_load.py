from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from services.config import ConfigError, dump_config, load_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_loads(recipe: Path) -> None:
    load_config(recipe)


def test_a_dumped_tree_loads_again(tmp_path: Path) -> None:
    config = load_config(None, ["learner.updates=7", "env.data=/games"])
    (tmp_path / "all.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "all.yaml") == config


def test_overrides_win_over_the_recipe_and_the_recipe_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"learner": {"updates": 1, "ranks": 2}, "algorithm": "grpo"}))
    (tmp_path / "top.yaml").write_text(yaml.safe_dump({"extends": "base.yaml", "learner": {"updates": 2}}))
    config = load_config(tmp_path / "top.yaml", ["optimizer.lr=1e-4"])
    assert (config.learner.updates, config.learner.ranks, config.algorithm) == (2, 2, "grpo")
    assert config.optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lerner.updates=3", "unknown configuration key 'lerner'"),
        ("learner.update=3", "unknown configuration key 'learner.update'"),
        ("learner.updates=0", "learner.updates"),
        ("learner.updates", "write key=value"),
        ("algorithm.name=x", "algorithm"),
        ("algorithm=ppo", "algorithm"),
        ("learner.group_size=1", "group_size must be at least 2"),
        ("env.max_steps=[", "not a YAML value"),
        ("model.lora.rnk=8", "unknown configuration key 'model.lora.rnk'"),
        ("learner={zero_stage: 0, offload_optimizer: true}", "needs learner.zero_stage"),
        ("learner.offload_parameters=true", "needs learner.zero_stage 3"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value)


def test_unreadable_recipes(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "circle.yaml").write_text("extends: circle.yaml\n")
    for name in ("list.yaml", "broken.yaml", "circle.yaml", "missing.yaml"):
        with pytest.raises(ConfigError, match=name):
            load_config(tmp_path / name)
