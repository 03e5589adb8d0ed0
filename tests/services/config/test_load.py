from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from services.config import Config, ConfigError, dump_config, load_config

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


def mistakes(*overrides: str, recipe: Path | None = None) -> list[str]:
    """What is said of a configuration, line by line."""
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("lerner.updates=3", "lerner: unknown key, did you mean learner?"),
        ("learner.updatse=3", "learner.updatse: unknown key, did you mean learner.updates?"),
        ("updates=3", "updates: unknown key, did you mean learner.updates?"),
        ("temperature=3", "temperature: unknown key, did you mean rollout.temperature or evaluation.temperature?"),
        ("nothing.like.it=3", "nothing: unknown key"),
        ("a..b=1", "a: unknown key"),
        ("model.lora.rnk=8", "model.lora.rnk: unknown key, did you mean model.lora.rank?"),
        ("envs=[{name: a, splt: x}]", "envs.0.splt: unknown key"),
        ("learner.updates=0", "learner.updates: must be >= 1, got 0"),
        ("learner.updates=true", "learner.updates: must not be true"),
        ("learner.zero_stage=true", "learner.zero_stage: must not be true"),
        ("learner.updates=2.5", "learner.updates: must be a whole number, got 2.5"),
        ("learner.updates=1:30", "learner.updates: must be a whole number, got '1:30'"),
        ("learner.updates=many", "learner.updates: must be a whole number, got 'many'"),
        ("learner.updates=3000000000", "learner.updates: must be at most 2,147,483,647, got 3e+09"),
        ("learner.updates=", "learner.updates: missing value after '='; write null for no value"),
        ("env.tasks=", "env.tasks: missing value after '='; write null for no value"),
        ("learner.updates=null", "learner.updates: must be a whole number, got null"),
        ("learner.updates", "'learner.updates': invalid override, expected key=value, as in learner.updates=50"),
        ("=3", "'=3': invalid override, expected key=value, as in learner.updates=50"),
        ("learner=5", "learner: must be a section (key: value), got 5"),
        ("learner=null", "learner: must be a section (key: value), got null"),
        ("learner=[{updates: 3}]", "learner: must be a section (key: value), got a list"),
        ("algorithm.name=x", "algorithm: must be one of "),
        ("algorithm=grop", ", got 'grop', did you mean grpo?"),
        ("learner.group_size=1", "learner.group_size: must be >= 2, got 1"),
        ("env.max_steps=[", "env.max_steps: invalid YAML: line 1, column 2: "),
        ("env={name: x, name: y}", "env: invalid YAML: line 1: duplicate key 'name'"),
        (
            "learner={zero_stage: 0, offload_optimizer: true}",
            "learner.offload_optimizer: requires learner.zero_stage >= 1,",
        ),
        ("learner.offload_parameters=true", "learner.offload_parameters: requires learner.zero_stage=3, got 1"),
        (
            "rollout.share_gpus=turn",
            "rollout.share_gpus: must be one of false, true, turns, got 'turn', did you mean tu",
        ),
        ("rollout.share_gpus=5", "rollout.share_gpus: must be one of false, true, turns, got 5"),
        ("rollout.share_gpus=turns", "learner.zero_stage: must be 2 or 3 with rollout.share_gpus=turns, got 1"),
        ("run.seed=-1", "run.seed: must be >= 0, got -1"),
        ("run.seed=4294967296", "run.seed: must be <= 2147483647, got 4294967296"),
        ("run.name=7", "run.name: must be text (quote it if it looks like a number), got 7"),
        ("run.name=a/b", "run.name: must match "),
        ("run.minutes=1e308", "run.minutes: must be at most 2,147,483,647, got 1e+308"),
        ("optimizer.lr=inf", "optimizer.lr: must be a finite number, got 'inf'"),
        ("optimizer.lr=.nan", "optimizer.lr: must be a finite number, got nan"),
        ("optimizer.lr=1e400", "optimizer.lr: must be a finite number, got inf"),
        ("optimizer.lr=[1, 2]", "optimizer.lr: must be a number, got a list"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: must be < 1.0, got 1.0"),
        ("optimizer.betas=[0.9, nan]", "optimizer.betas.1: must be a finite number, got 'nan'"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: missing value"),
        ("optimizer.betas=0.9", "optimizer.betas: must be a list, got 0.9"),
        ("env.success_reward=nan", "env.success_reward: must be a finite number, got 'nan'"),
        ("env.success_reward=0", "env.success_reward: must be > 0.0, got 0"),
        ("rollout.temperature=0.001", "rollout.temperature: must be >= 0.01, got 0.001"),
        ("rollout.lease_s=1e9", "rollout.lease_s: must be <= 31536000.0, got 1000000000.0"),
        ("env.url=localhost:8001", "env.url: must be the URL of a server"),
        ("env.urls=['http://a:1', 'http://']", "env.urls.1: must be the URL of a server"),
        ("env.url=http://a:99999", "env.url: must be the URL of a server"),
        ("buffer.redis_url=http://a:1", "buffer.redis_url: must be the URL of a Redis"),
        ("rollout.temperature=2.1", "rollout.temperature: must be <= 2.0, got 2.1"),
        ("evaluation.temperature=50", "evaluation.temperature: must be <= 2.0, got 50"),
        ("buffer.redis_url=redis://a:6379/runs", "buffer.redis_url: must be the URL of a Redis"),
        ('run.dir="a\\0b"', "run.dir: must not contain a null character"),
        ('model.lora.targets=["a", "b\\0"]', "model.lora.targets: must not contain a null character"),
        ("evaluation.split=[valid_seen, null]", "evaluation.split: must be a split name or a list of split names"),
        ("evaluation.split=[valid_seen, '']", "evaluation.split: must not contain an empty name"),
        ("warmstart.phases=[{tokens: 10}]", "warmstart.phases.0.tokens: must be >= 1000, got 10"),
        ("checkpoint.keep=1", "checkpoint.keep: must be >= 2, got 1"),
        ("evaluation.split=''", "evaluation.split: must not be empty, got ''"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override: str, line: str) -> None:
    [said] = mistakes(override)
    assert line in said
    assert said.startswith(line) or line.startswith(",")


def test_what_cannot_go_together_with_turns_is_told_all_at_once() -> None:
    wrong = ["learner.offload_parameters=true", "rollout.actors=2", "weights.channel=nccl", "learner.reference=sharded"]
    found = mistakes("rollout.share_gpus=turns", "learner.zero_stage=3", "loss.kl_coef=0.01", *wrong)
    assert [line.partition(":")[0] for line in found] == sorted(each.partition("=")[0] for each in wrong)
    assert found[2] == (
        "rollout.actors: must be 1 with rollout.share_gpus=turns, got 2; for an engine on several GPUs set "
        "rollout.tensor_parallel"
    )


def numbers(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the tree that takes a float, or that takes an int."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from numbers(inner, f"{prefix}{name}.")
        elif {int, float} & {inner, *get_args(inner)}:
            yield prefix + name


@pytest.mark.parametrize("key", [*numbers(Config)])
@pytest.mark.parametrize("value", [".nan", "inf", "-.inf", "1e400", "1e300", "-1e300", "true"])
def test_no_number_is_infinite_none_or_beyond_all_bounds(key: str, value: str) -> None:
    [line] = mistakes(f"{key}={value}")
    assert line.startswith(f"{key}: ")


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learner: {updatse: 3, zero_stage: 0}\nmodel: {dtype: bfloat16}\nrun: {seed: -1}\n")
    said = mistakes("optimizer.lr=inf", "nonsense", "loss.mask_beyond=2", "loss.importance_cap=null", recipe=recipe)
    assert [line.partition(" ")[0] for line in said] == [
        "'nonsense':",
        "run.seed:",
        "loss.mask_beyond:",
        "optimizer.lr:",
        "learner.updatse:",
        "learner.zero_stage:",
    ]


def test_a_mistake_in_a_list_hides_no_other() -> None:
    said = mistakes(
        "envs=[{name: a, splt: x, weight: 0}]",
        "optimizer.betas=[0.9, 1.0]",
        "learner.zero_stage=0",
        "learner.offload_optimizer=true",
    )
    assert [line.partition(" ")[0] for line in said] == [
        "envs.0.weight:",
        "envs.0.splt:",
        "optimizer.betas.1:",
        "learner.offload_optimizer:",
    ]


def test_neither_the_input_nor_a_secret_is_shown() -> None:
    secret = "redis://:hidden@a:1"
    for override in (
        f"buffer.redis_url=[{secret}]",
        f"env.urls=[http://me:hidden@a:1, {secret}]",
        "env={url: 'http://me:hidden@a:1', urls: ['http://me:hidden@b:2']}",
        f"run.name={secret}",
        f"learner.updates={secret}",
        f"nothing={secret}",
        f"{secret}",
        "buffer.password=hidden",
        "run.name=" + 500 * "a",
    ):
        said = "\n".join(mistakes(override))
        assert "hidden" not in said.replace("(hidden)", "")
        assert len(said) < 250


def test_values_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    config = load_config(
        None, ["telemetry.wandb=off", "learner.updates=010", "optimizer.lr=1e-4", "run.name=2026-01-01", "env.split=on"]
    )
    assert (config.telemetry.trackers, config.learner.updates, config.optimizer.lr) == (("tensorboard",), 10, 1e-4)
    assert (config.run.name, config.env.split) == ("2026-01-01", "on")
    odd = load_config(None, ["run.name='1e5'", "env.split='true'", "env.name='7'", "model.path='null'"])
    (tmp_path / "odd.yaml").write_text(dump_config(odd))
    assert load_config(tmp_path / "odd.yaml") == odd


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("- 1\n", "must be a mapping of sections, got a list"),
        ("7\n", "must be a mapping of sections, got 7"),
        ("a: [\n", ": invalid YAML: line 2, column 1: "),
        ("a: b: c\n", ": invalid YAML: line 1, column 5: "),
        ("\ta: 1\n", ": invalid YAML: line 1, column 1: "),
        ("run: {seed: 1}\nrun: {seed: 2}\n", ": invalid YAML: line 2: duplicate key 'run'"),
        ("run:\n  seed: 1\n  seed: 2\n", ": invalid YAML: line 3: duplicate key 'seed'"),
        ("1: 2\n", ": invalid YAML: line 1: key must be text, got 1"),
        ("? [a]\n: 2\n", ": invalid YAML: line 1: key must be text, got ['a']"),
        ("a: !!python/object:os.system {}\n", ": invalid YAML: line 1, column 4: "),
        ("a: &x [*x]\n", "a: unknown key"),
        ("a: " + 3000 * "[" + "\n", ": invalid YAML: "),
        ("extends: recipe.yaml\n", "extends itself"),
        ("extends: [a]\n", "extends must be the path of one recipe, got a list"),
        ('extends: "a\\0b"\n', "extends must be the path of one recipe, got "),
        ("extends: gone.yaml\n", "cannot read the recipe "),
        ("a: \x00\n", ": invalid YAML: "),
        ("run:\n", "run: must be a section (key: value), got null"),
    ],
)
def test_recipes_of_the_wrong_shape(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    [said] = mistakes(recipe=tmp_path / "recipe.yaml")
    assert line in said


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    assert mistakes(recipe=tmp_path / "binary.yaml") == [f"{tmp_path}/binary.yaml: not UTF-8 text"]
    for name, hint in (
        ("binry.yaml", f", did you mean {tmp_path}/binary.yaml?"),
        ("binary", f", did you mean {tmp_path}/binary.yaml?"),
        ("demo.yaml", ", did you mean configs/demo.yaml?"),
        ("learner.updates=3", "; give the recipe before the overrides"),
        ("zzzzzzzz", "No such file or directory"),
    ):
        [said] = mistakes(recipe=tmp_path / name)
        assert said.startswith(f"cannot read the recipe {tmp_path / name}: No such file or directory")
        assert hint in said
    [said] = mistakes(recipe=tmp_path)
    assert "Is a directory" in said


@pytest.mark.parametrize(
    ("overrides", "trackers", "params"),
    [
        (["telemetry.tensorboard=false"], (), {}),
        (["telemetry.tensorboard=true"], ("tensorboard",), {}),
        (["telemetry.wandb=offline"], ("tensorboard", "wandb"), {"wandb": {"mode": "offline"}}),
        (
            ["telemetry.tensorboard=false", "telemetry.wandb=online", "telemetry.wandb_project=harbour"],
            ("wandb",),
            {"wandb": {"mode": "online", "project": "harbour"}},
        ),
        (["telemetry.trackers=[mlflow]", "telemetry.params.mlflow.uri=a"], ("mlflow",), {"mlflow": {"uri": "a"}}),
    ],
)
def test_recipes_of_before_name_their_trackers(overrides, trackers, params) -> None:  # type: ignore[no-untyped-def]
    config = load_config(None, overrides)
    assert (config.telemetry.trackers, config.telemetry.params) == (trackers, params)
    assert config == load_config(yaml.safe_load(dump_config(config)))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("telemetry.wandb=on", "telemetry.wandb: must be one of off, offline, online, got 'on'"),
        (
            "telemetry.trackers=[wandbb]",
            "telemetry.trackers.0: must be one of tensorboard, wandb, mlflow, trackio, or a",
        ),
        ("telemetry.params.wandbb.mode=offline", "no such tracker in telemetry.trackers, did you mean wandb?"),
    ],
)
def test_wrong_trackers_are_one_line(override: str, line: str) -> None:
    [said] = mistakes(override)
    assert line in said
