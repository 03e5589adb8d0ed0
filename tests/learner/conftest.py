"""A tiny model on disk and the settings of tiny runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.config.tree import Config


def write_model(folder: Path, vocabulary: int) -> Path:
    """A Qwen2 model of some thousand parameters, with its weights tied as in the small Qwen models."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 tokens."""
    return write_model(tmp_path_factory.mktemp("model"), 64)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 32,768 tokens: the logits of eight positions take a MiB."""
    return write_model(tmp_path_factory.mktemp("wide"), 2**15)


@pytest.fixture(scope="session")
def tiny_settings(tiny_model: Path) -> dict[str, dict[str, object]]:
    """Two groups of two an update, one rank, checkpoints every two updates."""
    return {
        "model": {"path": tiny_model},
        "loss": {"kl_coef": 0.0},
        "optimizer": {"lr": 1e-3},
        "learner": {
            "groups_per_update": 2,
            "group_size": 2,
            "microbatch_tokens": 64,
            "group_timeout_s": 60,
            "max_logprob_gap": None,  # synthetic log-probabilities are nobody's
        },
        "checkpoint": {"every": 2},
        "telemetry": {"tensorboard": False},
    }


@pytest.fixture
def tiny_config(tiny_settings: dict[str, dict[str, object]], tmp_path: Path, run_name: str) -> Config:
    """The settings in a run of the test's own."""
    return Config.model_validate(tiny_settings | {"run": {"name": run_name, "dir": tmp_path}})
