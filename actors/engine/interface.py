"""What a rollout actor asks of an inference engine: vocabulary only, no engine is known here.

Invariants
- A `Sample` holds the very token ids and log-probabilities that were sampled, and the policy version of each token.
- Loading weights never drops a request: what is in flight goes on with the new weights.
- After a failure every call raises `EngineFailed`; a failed engine never answers with weights of an unknown version.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from services.errors import AnchorageError
from services.schemas import VersionSpan

if TYPE_CHECKING:
    import torch

    from services.weights.collective import Incoming


class EngineFailed(AnchorageError):
    """The inference engine cannot start, stopped working, or cannot load a policy version."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response.

    Attributes:
        token_ids: the R sampled tokens, end-of-sequence included where it was sampled.
        logprobs: R log-probabilities (nats) under the sampling distribution at the sampling temperature.
        versions: policy versions of the response in token order; their token counts sum to R.
        text: the decoded response without EOS and padding; other special tokens are in it.
        finished: the response ended by itself, not by the token limit.
    """

    token_ids: list[int]
    logprobs: list[float]
    versions: tuple[VersionSpan, ...]
    text: str
    finished: bool


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start of an engine.

    Attributes:
        responses: finished responses. response_tokens / prompt_tokens: their tokens.
        cached_tokens: of the prompts' tokens, those that were found in the prefix cache.
        running: requests in flight now.
        updates: weight updates. update_seconds: time generation stood still for them, in all.
        kv_use: share of the KV cache in use after the last step, 0 to 1; None where the engine does not say.
    """

    responses: int = 0
    response_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    running: int = 0
    updates: int = 0
    update_seconds: float = 0.0
    kv_use: float | None = None


class Sampler(Protocol):
    """The part of an engine that plays episodes; see `InferenceEngine.generate`."""

    async def generate(
        self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int
    ) -> Sample: ...


class InferenceEngine(ABC):
    """Samples responses of one policy for many callers at once."""

    @property
    @abstractmethod
    def version(self) -> int:
        """Policy version that samples now; 0 for the model folder's own weights."""

    @abstractmethod
    async def start(self) -> None:
        """Load the model. Who calls it again waits for the same start.

        Raises:
            ModelUnavailable: the model folder cannot be loaded.
            EngineFailed: the engine cannot start.
        """

    @abstractmethod
    async def generate(self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int) -> Sample:
        """Sample one response to the prompt (token ids). Cancelling the call drops the request.

        Raises:
            ValueError: the prompt does not fit the model's context.
            EngineFailed: the engine is stopped or broken.
        """

    @abstractmethod
    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on with other weights (Hugging Face names, host memory), requests in flight kept.

        Raises:
            EngineFailed: the weights do not fit the model; the engine is unusable from then on.
        """

    async def receive_weights(self, incoming: Incoming) -> None:
        """Join a collective transfer and go on with the weights that come, requests in flight kept.

        Raises:
            TransferLost: it did not begin; nothing has changed.
            EngineFailed: this engine cannot do it, or the weights do not fit; then it is unusable from then on.
        """
        raise EngineFailed("this inference engine cannot take weights.channel=nccl")

    @abstractmethod
    async def stop(self) -> None:
        """Drop what is in flight and release the model. Idempotent."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """Counters since the start."""
