"""Sizes are those of the real models, read without their weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anchorage.planning.shapes import COUNTED, PUBLISHED, shape_from, shape_of
from services.errors import ModelUnavailable
from tests.models import SMALL, random_model

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": SMALL.like("LlamaConfig"),
    "llama_untied": SMALL.like("LlamaConfig", tie_word_embeddings=False),
    "qwen2": SMALL.like("Qwen2Config"),
    "qwen3": SMALL.like("Qwen3Config"),
    "qwen3_moe": SMALL.like("Qwen3MoeConfig", **EXPERTS),
    "qwen3_moe_and_dense": SMALL.like("Qwen3MoeConfig", **EXPERTS, mlp_only_layers=[0]),
    "phi3": SMALL.like("Phi3Config"),
    "gpt2": SMALL.only("GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=SMALL.positions),
}
WIDE: dict[str, Any] = {"sliding_window": SMALL.positions}
"""Longer than the rows: what else a window does is seen in masks."""
OTHERS: dict[str, Callable[[], Any]] = {
    "exaone4": SMALL.like("Exaone4Config", **WIDE),
    "gemma": SMALL.like("GemmaConfig"),
    "gemma3": SMALL.like("Gemma3TextConfig", query_pre_attn_scalar=8, **WIDE),
    "glm4": SMALL.like("Glm4Config"),
    "granite": SMALL.like("GraniteConfig", logits_scaling=8.0, residual_multiplier=0.22),
    "hunyuan": SMALL.like("HunYuanDenseV1Config"),
    "mistral": SMALL.like("MistralConfig", **WIDE),
    "mixtral": SMALL.like("MixtralConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "olmo2": SMALL.like("Olmo2Config"),
    "olmo3": SMALL.like("Olmo3Config", **WIDE),
    "qwen2_moe": SMALL.like("Qwen2MoeConfig", **EXPERTS, shared_expert_intermediate_size=40),
    "seed_oss": SMALL.like("SeedOssConfig"),
    "smollm3": SMALL.like("SmolLM3Config", no_rope_layers=[1, 0]),
}
SIZES = {
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen3-4B": 4_022_468_096,
}
"""Numbers of parameters that the models' pages state."""


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = (MODELS | OTHERS)[name]()
    parameters = sum(parameter.numel() for parameter in random_model(config).parameters())
    assert shape_from(config.to_dict()).computed == parameters


def test_every_architecture_that_is_called_counted_is_compared() -> None:
    compared = {make().model_type for make in (MODELS | OTHERS).values()}
    assert compared == set(COUNTED)


def test_published_sizes_give_the_stated_numbers_of_parameters() -> None:
    assert {name: shape.computed for name, shape in PUBLISHED.items()} == SIZES


def test_experts_that_a_token_does_not_use_are_not_active() -> None:
    shape = shape_from(MODELS["qwen3_moe"]().to_dict())
    assert shape.computed - shape.active == 2 * 2 * 3 * 32 * 24


def test_a_folder_with_the_configuration_alone_is_enough(tmp_path: Path) -> None:
    shutil.copy("models/starter/config.json", tmp_path)
    whole, alone = shape_of(Path("models/starter")), shape_of(tmp_path)
    assert whole.stored == alone.parameters == alone.computed


def test_a_model_that_is_not_there_is_known_by_its_name_or_asked_for(tmp_path: Path) -> None:
    assert shape_of(tmp_path / "Qwen3-4B") == PUBLISHED["Qwen3-4B"]
    with pytest.raises(ModelUnavailable, match=r"/Mine has no config\.json, which a plan needs"):
        shape_of(tmp_path / "Mine")


def test_a_folder_takes_precedence_over_the_published_sizes(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-4B"
    folder.mkdir()
    shutil.copy("models/starter/config.json", folder)
    assert shape_of(folder).layers != PUBLISHED["Qwen3-4B"].layers


@pytest.mark.parametrize("text", ["[]", "{", json.dumps({"model_type": "llama", "hidden_size": 8})])
def test_a_configuration_without_sizes_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelUnavailable) as caught:
        shape_of(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_hidden_layers", 0), ("hidden_size", 0), ("vocab_size", -1), ("intermediate_size", -1)),
        *(("num_attention_heads", -2), ("num_key_value_heads", -1), ("head_dim", -4), ("num_experts", -3)),
    ],
)
def test_a_size_below_1_is_one_line(tmp_path: Path, name: str, value: int) -> None:
    whole = json.loads(Path("models/starter/config.json").read_text()) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ModelUnavailable, match=rf"config\.json has sizes of another form .*={value} must be >= 1"):
        shape_of(tmp_path)


def test_a_plan_imports_nothing_that_takes_long() -> None:
    code = (
        "import sys; from pathlib import Path; from services.config import load_config\n"
        "from anchorage.planning.plan import cards_of, make_plan; from anchorage.planning.shapes import shape_of\n"
        "config = load_config(Path('configs/alfworld.yaml'), [])\n"
        "assert make_plan(config, shape_of(config.model.path), cards_of('8x80')).rank_total > 0\n"
        "print(sorted({'torch', 'transformers', 'ray', 'vllm', 'deepspeed'} & sys.modules.keys()))"
    )
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    assert told.stdout == "[]\n"
