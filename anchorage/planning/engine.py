"""Memory of one vLLM engine: weights, workspace, and the KV cache in what is left of its share of the card.

vLLM takes `rollout.gpu_memory_utilization` of a card, and makes a KV cache of what weights and one pass over
`max_num_batched_tokens` leave of it. On CPUs the cache is `rollout.kv_cache_mib`.
"""

from __future__ import annotations

from dataclasses import dataclass

from anchorage.planning.assumptions import Assumptions
from anchorage.planning.shapes import Shape
from anchorage.planning.states import number_bytes
from services.config.tree import Config

GIB = 2**30
_FLOAT = 4


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
    overhead = int((assumed.context_gib + assumed.graphs_gib) * GIB)
    share = int(rollout.gpu_memory_utilization * card)
    return Engine(share, weights, workspace, overhead, share - weights - workspace - overhead, token, context)


def batch_tokens(config: Config, *, cpu: bool) -> int:
    """Most tokens of one pass, as `actors/engine/vllm.py` sets it."""
    from actors.engine.vllm import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS

    context = config.model.max_prompt_tokens + config.model.max_response_tokens
    return max(CPU_BATCH_TOKENS, context) if cpu else GPU_BATCH_TOKENS


def _cache_bytes(config: Config) -> int:
    return number_bytes(config)


def _weight_bytes(config: Config) -> float:
    return number_bytes(config)
