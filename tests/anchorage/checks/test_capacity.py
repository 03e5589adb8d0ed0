"""A run that cannot fit is refused in one line, with the overrides to use; whatever might fit is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from anchorage.checks import capacity
from anchorage.checks import preflight as checks
from anchorage.checks.capacity import capacity_problems, cards_here
from anchorage.checks.preflight import Start, preflight
from anchorage.planning.plan import Cards
from services.config import Config, load_config
from services.errors import PreflightFailed

GIB = 2**30
EIGHT = Cards(8, 79.6)
"""As cards that are sold with 80 GB report themselves."""


def problems(recipe: str, cards: Cards, *overrides: str, memory: int = 2**40) -> list[str]:
    return list(capacity_problems(load_config(Path(f"configs/{recipe}.yaml"), overrides), cards, memory))


def applied(recipe: str, line: str) -> Config:
    """The configuration with the overrides that a line advises."""
    advice = line.partition("; set ")[2].partition(" (anchorage plan")[0]
    return load_config(Path(f"configs/{recipe}.yaml"), advice.split())


@pytest.mark.parametrize(
    ("recipe", "cards", "overrides"),
    [
        ("alfworld-7b", EIGHT, ["learner.activation_checkpointing=false"]),
        ("alfworld", Cards(1, 79.6), []),
        ("alfworld", Cards(2, 39.5), []),
        ("alfworld-one-gpu", Cards(1, 23.6), []),
        ("alfworld-one-gpu", Cards(1, 79.6), ["rollout.gpu_memory_utilization=0.85"]),
    ],
)
def test_what_cannot_fit_is_one_line_with_overrides_that_fit(recipe: str, cards: Cards, overrides: list[str]) -> None:
    (line,) = problems(recipe, cards, *overrides)
    assert line.startswith("the run does not fit: ")
    assert "\n" not in line
    assert list(capacity_problems(applied(recipe, line), cards, 2**40)) == []


@pytest.mark.parametrize("recipe", ["alfworld", "alfworld-7b", "alfworld-qwen3", "webshop-7b"])
def test_recipes_are_not_refused_on_the_cards_that_they_are_for(recipe: str) -> None:
    assert problems(recipe, EIGHT) == []


def test_what_is_only_assumed_does_not_refuse_a_run() -> None:
    # 77.9 GiB are computed, and 2 more assumed.
    tight = ("learner.microbatch_tokens=16384",)
    assert problems("alfworld", Cards(2, 79.6), *tight) == []


def test_no_overrides_are_advised_where_none_fit() -> None:
    (line,) = problems("alfworld-7b", Cards(1, 7.9))
    assert "use more or larger GPUs, or a smaller model" in line


def test_memory_of_the_machine_counts_without_gpus() -> None:
    (line,) = problems("demo", Cards(0, 0.0), memory=GIB // 8)
    assert "learner and engines need" in line
    assert problems("demo", Cards(0, 0.0), memory=GIB) == []


@pytest.mark.parametrize("recipe", ["demo", "starter", "webshop-starter", "cluster"])
def test_what_runs_here_is_not_refused(recipe: str) -> None:
    assert problems(recipe, Cards(0, 0.0), memory=8 * GIB) == []


def test_sizes_that_cannot_be_read_are_left_to_other_checks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    assert problems("demo", EIGHT, f"model.path={tmp_path}") == []


def test_the_preflight_of_a_training_run_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shutil.copytree("models/starter", tmp_path / "model")
    config = Config.model_validate({"run": {"dir": tmp_path / "runs"}, "model": {"path": model}})
    preflight(Start(config, models=(model,), trains=True))
    monkeypatch.setattr(checks, "cards_here", lambda: Cards(2, 0.001))
    with pytest.raises(PreflightFailed, match="the run does not fit: a learner rank needs"):
        preflight(Start(config, models=(model,), trains=True))
    preflight(Start(config, models=(model,)))  # playing alone loads no learner
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    preflight(Start(config, models=(model,), trains=True))


def test_cards_of_a_machine_whose_vllm_computes_on_cpus_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "engine_is_on_cpu", lambda: True)
    assert cards_here() == Cards(0, 0.0)
