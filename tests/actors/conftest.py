"""A tokenizer folder, and a configuration that plays the counting environment with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.config.tree import Config
from tests.actors.scripted_engine import tokenizer_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def config(model_folder: Path, run_name: str, tmp_path: Path) -> Config:
    return Config.model_validate(
        {
            "run": {"name": run_name, "dir": tmp_path},
            "model": {"path": model_folder, "max_prompt_tokens": 200, "max_response_tokens": 16},
            "env": {"name": "counting", "max_steps": 12, "success_reward": 10.0},
            "prompt": {"template": "compact"},
            "rollout": {"episodes_in_flight": 6, "lease_s": 60.0, "max_attempts": 2},
            "weights": {"channel": "directory"},
        }
    )
