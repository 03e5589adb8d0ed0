"""Small random models of many architectures, by how the learner runs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.models import SMALL, random_model

VOCABULARY = SMALL.vocabulary
POSITIONS = SMALL.positions
_like, _only = SMALL.like, SMALL.only
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 24,
    "moe_num_experts": 4,
}
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
STATE: dict[str, Any] = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}


PACKED: dict[str, Callable[[], Any]] = {
    "llama": _like("LlamaConfig"),
    "llama_untied_with_biases": _like("LlamaConfig", tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama4": _like("Llama4TextConfig", **EXPERTS, attention_chunk_size=POSITIONS, intermediate_size_mlp=48),
    "mistral_window": _like("MistralConfig", sliding_window=12),
    "ministral": _like("MinistralConfig", sliding_window=12, layer_types=["sliding_attention", "full_attention"]),
    "qwen2": _like("Qwen2Config"),
    "qwen2_window": _like("Qwen2Config", use_sliding_window=True, sliding_window=12, max_window_layers=1),
    "qwen2_moe": _like("Qwen2MoeConfig", **EXPERTS),
    "qwen3": _like("Qwen3Config"),
    "qwen3_moe": _like("Qwen3MoeConfig", **EXPERTS, output_router_logits=True),
    "mixtral": _like("MixtralConfig", **EXPERTS, router_jitter_noise=0.5, sliding_window=None),
    "gemma": _like("GemmaConfig"),
    "gemma3_window": _like("Gemma3TextConfig", query_pre_attn_scalar=8, sliding_window=12),
    "granite": _like(
        "GraniteConfig",
        logits_scaling=8.0,
        residual_multiplier=0.22,
        embedding_multiplier=12.0,
        attention_multiplier=0.0625,
    ),
    "granitemoe": _like("GraniteMoeConfig", **EXPERTS, logits_scaling=6.0),
    "phi3": _like("Phi3Config"),
    "olmo": _like("OlmoConfig", clip_qkv=0.5),
    "olmo2": _like("Olmo2Config"),
    "olmo3": _like("Olmo3Config", sliding_window=12, layer_types=["sliding_attention", "full_attention"]),
    "olmoe": _like("OlmoeConfig", **EXPERTS),
    "smollm3": _like("SmolLM3Config", no_rope_layers=[1, 0]),
    "cohere": _like("CohereConfig", logit_scale=0.25),
    "cohere2": _like("Cohere2Config", logit_scale=0.25, sliding_window=12),
    "glm": _like("GlmConfig"),
    "glm4": _like("Glm4Config"),
    "glm4_moe": _like("Glm4MoeConfig", **LATENT, **{"n_shared_experts": 1}),
    "deepseek_v2": _like("DeepseekV2Config", **LATENT),
    "deepseek_v3": _like("DeepseekV3Config", **LATENT),
    "exaone4": _like("Exaone4Config", sliding_window=12, layer_types=["sliding_attention", "full_attention"]),
    "ernie4_5": _like("Ernie4_5Config"),
    "helium": _like("HeliumConfig"),
    "seed_oss": _like("SeedOssConfig"),
    "arcee": _like("ArceeConfig"),
    "apertus": _like("ApertusConfig"),
    "hunyuan": _like("HunYuanDenseV1Config"),
    "starcoder2": _like("Starcoder2Config", sliding_window=12, residual_dropout=0.3, embedding_dropout=0.3),
    "phi": _like("PhiConfig", resid_pdrop=0.3, embd_pdrop=0.3),
    "gpt2": _only(
        "GPT2Config",
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        resid_pdrop=0.4,
        attn_pdrop=0.4,
        embd_pdrop=0.4,
        summary_first_dropout=0.4,
    ),
    "gpt_neox": _like("GPTNeoXConfig", hidden_dropout=0.3, attention_dropout=0.3),
    "gpt_bigcode": _only("GPTBigCodeConfig", n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, resid_pdrop=0.3),
    "opt": _only(
        "OPTConfig",
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        max_position_embeddings=POSITIONS,
        dropout=0.4,
        layerdrop=0.5,
    ),
    "persimmon": _like("PersimmonConfig", hidden_dropout=0.3),
    "biogpt": _only(
        "BioGptConfig",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        layerdrop=0.5,
    ),
}
"""Those for which a line of packed rows is the model's own function."""

ROWS: dict[str, Callable[[], Any]] = {
    "llama4_chunks": _like("Llama4TextConfig", **EXPERTS, attention_chunk_size=12, intermediate_size_mlp=48),
    "gemma2": _like("Gemma2Config", query_pre_attn_scalar=8, sliding_window=12, attn_logit_softcapping=2.0),
    "vaultgemma": _like("VaultGemmaConfig", query_pre_attn_scalar=8, sliding_window=12),
    "gpt_oss": _like("GptOssConfig", **EXPERTS, sliding_window=12),
    "stablelm": _like("StableLmConfig", attention_dropout=0.3, hidden_dropout=0.3),
    "nemotron": _like("NemotronConfig", attention_dropout=0.3),
    "gpt_neo": _only(
        "GPTNeoConfig",
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=12,
        max_position_embeddings=POSITIONS,
        resid_dropout=0.3,
    ),
    "gptj": _only("GPTJConfig", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=POSITIONS, resid_pdrop=0.3),
    "bloom": _only("BloomConfig", hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.3),
    "mpt": _only("MptConfig", d_model=32, n_layers=2, n_heads=4, max_seq_len=POSITIONS, resid_pdrop=0.3),
    "falcon": _only(
        "FalconConfig",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout=0.3,
    ),
    "falcon_alibi": _only(
        "FalconConfig",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=True,
        new_decoder_architecture=False,
        parallel_attn=False,
    ),
    "codegen": _only("CodeGenConfig", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=POSITIONS),
    "xglm": _only(
        "XGLMConfig",
        d_model=32,
        ffn_dim=48,
        num_layers=2,
        attention_heads=4,
        layerdrop=0.5,
        max_position_embeddings=POSITIONS,
    ),
    "qwen3_5": _like("Qwen3_5TextConfig", **DELTA),
    "qwen3_next": _like("Qwen3NextConfig", **DELTA, **EXPERTS),
    "lfm2": _like("Lfm2Config", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "mamba": _only("MambaConfig", hidden_size=32, num_hidden_layers=2, state_size=8),
    "mamba2": _only(
        "Mamba2Config", hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1
    ),
    "falcon_mamba": _only("FalconMambaConfig", hidden_size=32, num_hidden_layers=2, state_size=8),
    "falcon_h1": _like("FalconH1Config", **STATE, lm_head_multiplier=0.5),
    "bamba": _like("BambaConfig", **{**STATE, "mamba_expand": 1}, attn_layer_indices=[1]),
    "jamba": _like(
        "JambaConfig", **EXPERTS, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
    ),
    "zamba2": _like(
        "Zamba2Config",
        mamba_d_state=8,
        n_mamba_heads=4,
        mamba_ngroups=1,
        num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid"],
        use_mamba_kernels=False,
    ),
    "granitemoehybrid": _like(
        "GraniteMoeHybridConfig",
        **EXPERTS,
        **{**STATE, "mamba_expand": 1},
        layer_types=["mamba", "attention"],
        logits_scaling=4.0,
    ),
    "recurrent_gemma": _like(
        "RecurrentGemmaConfig",
        lru_width=32,
        attention_window_size=12,
        logits_soft_cap=5.0,
        block_types=["recurrent", "attention"],
    ),
    "nemotron_h": _like(
        "NemotronHConfig", **{"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1}
    ),
    "minimax": _like("MiniMaxConfig", **EXPERTS, layer_types=["linear_attention", "full_attention"], block_size=16),
}
"""Those for which it is not, or cannot be had: each row goes through the model's own forward pass."""

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bert": (_like("BertConfig"), "not causal"),
    "xlnet": (_only("XLNetConfig", d_model=32, n_layer=2, n_head=4, d_inner=48), "not causal"),
    "rwkv": (
        _only("RwkvConfig", hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=POSITIONS),
        "rewrites its own weights",
    ),
}
"""Those that cannot be trained, and a part of the reason."""


def write_architecture(folder: Path, config: Any) -> Path:
    """A folder with such a model, and a tokenizer file that nobody reads."""
    random_model(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder
