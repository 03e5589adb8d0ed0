"""Random models of several architectures that vLLM runs on a CPU, as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.actors.tokenizer import write_tokenizer
from tests.models import SERVED, random_model

SHAPE = SERVED.shape
_like = SERVED.like
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 16,
}


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama_untied": _like("LlamaConfig", tie_word_embeddings=False),
    "gemma2": _like("Gemma2Config", query_pre_attn_scalar=32),
    "granite": _like(
        "GraniteConfig",
        logits_scaling=8.0,
        residual_multiplier=0.22,
        embedding_multiplier=12.0,
        attention_multiplier=0.0625,
    ),
    "phi3": _like("Phi3Config"),
    "gpt2": SERVED.only("GPT2Config", n_embd=64, n_layer=2, n_head=2, n_positions=512),
    "qwen3_moe": _like("Qwen3MoeConfig", num_experts=4, **EXPERTS),
    "qwen2_moe": _like("Qwen2MoeConfig", num_experts=4, shared_expert_intermediate_size=64, **EXPERTS),
    "mixtral": _like("MixtralConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    # Its router has a correction bias, which is a buffer; its first layer is dense and names its parts as experts do.
    "glm4_moe": _like(
        "Glm4MoeConfig",
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        n_shared_experts=1,
        tie_word_embeddings=False,
        **EXPERTS,
    ),
    "deepseek_v3": _like(
        "DeepseekV3Config",
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        n_shared_experts=1,
        topk_method="noaux_tc",
        tie_word_embeddings=False,
        **EXPERTS,
        **LATENT,
    ),
}


def make(name: str, seed: int = 1) -> Any:
    """A model of one of `CONFIGS`."""
    return random_model(CONFIGS[name](), seed=seed, bias=0.3)


def write(folder: Path, model: Any) -> Path:
    """Its folder, with a tokenizer of bytes."""
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
