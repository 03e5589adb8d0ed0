"""Memory of one vLLM engine: weights, workspace, and the KV cache in what is left of its share of the card.

vLLM takes `rollout.gpu_memory_utilization` of a card, and makes a KV cache of what weights and one pass over
`max_num_batched_tokens` leave of it. On CPUs the cache is `rollout.kv_cache_mib`.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.engine.vllm import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS
from anchorage.planning.assumptions import Assumptions
from anchorage.planning.shapes import Shape
from anchorage.planning.states import number_bytes
from services.config.tree import Config

GIB = 2**30
_FLOAT = 4
_QUANTISED = {"fp8": 1.0, "mxfp8": 1.0, "int8": 1.0, "mxfp4": 0.6, "int4": 0.6}
"""Bytes of a weight by the beginning of `rollout.engine.quantization`; other methods are counted as not quantised."""


@dataclass(frozen=True, slots=True)
class Engine:
    """Bytes of one tensor-parallel rank of an engine.

    Attributes:
        share: what vLLM takes of the card; on CPUs everything that it needs.
        weights: of the model.
        workspace: of one pass over the longest batch, with the logits of all requests.
        overhead: of the process and of CUDA graphs.
        cache: KV cache; negative if the share is too small for the rest.
        token: of the cache, for one token.
        context: most tokens of a prompt and its response.
    """

    share: int
    weights: int
    workspace: int
    overhead: int
    cache: int
    token: int
    context: int

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds."""
        return max(0, self.cache) // self.token

    @property
    def episodes(self) -> int:
        """Episodes whose prompt and response it holds at their greatest length."""
        return self.tokens // self.context


def engine_of(shape: Shape, config: Config, assumed: Assumptions, card: int | None) -> Engine:
    """Compute the bytes of one tensor-parallel rank; `card`: usable bytes of its GPU, None on CPUs."""
    rollout, number, parts = config.rollout, number_bytes(config), config.rollout.tensor_parallel
    context = config.model.max_prompt_tokens + config.model.max_response_tokens
    token = 2 * shape.layers * shape.head * -(-shape.kv_heads // parts) * _cache_bytes(config)
    weights = int(-(-shape.parameters // parts) * _weight_bytes(config))
    batch = batch_tokens(config, cpu=card is None)
    wide = shape.inner if shape.experts is None else max(shape.inner, shape.experts.chosen * shape.experts.width)
    pass_ = batch * number * (4 * shape.hidden + 3 * wide // parts)
    workspace = pass_ + 3 * _FLOAT * shape.vocabulary * min(rollout.episodes_in_flight, batch)
    if card is None:
        cache = rollout.kv_cache_mib * 2**20 // parts
        # Its kernels read packed copies of the weights.
        return Engine(2 * weights + workspace + cache, 2 * weights, workspace, 0, cache, token, context)
    graphs = 0.0 if rollout.engine.get("enforce_eager") is True else assumed.graphs_gib
    overhead = int((assumed.context_gib + graphs) * GIB)
    share = int(rollout.gpu_memory_utilization * card)
    return Engine(share, weights, workspace, overhead, share - weights - workspace - overhead, token, context)


def batch_tokens(config: Config, *, cpu: bool) -> int:
    """Most tokens of one pass, as `actors/engine/vllm.py` sets it."""
    given = config.rollout.engine.get("max_num_batched_tokens")
    context = config.model.max_prompt_tokens + config.model.max_response_tokens
    return int(given) if isinstance(given, int) else max(CPU_BATCH_TOKENS, context) if cpu else GPU_BATCH_TOKENS


def _cache_bytes(config: Config) -> int:
    """Bytes of a number in the KV cache."""
    return 1 if str(config.rollout.engine.get("kv_cache_dtype", "")).startswith("fp8") else number_bytes(config)


def _weight_bytes(config: Config) -> float:
    """Bytes of a weight in the engine; embedding and head, which vLLM does not quantise, count like the others."""
    method = str(config.rollout.engine.get("quantization") or "")
    return next((size for start, size in _QUANTISED.items() if method.startswith(start)), number_bytes(config))
