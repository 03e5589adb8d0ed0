"""Interface of inference engines, as rollout actors use them. Depends on no engine.

Invariants
- A `Sample` holds exactly the token ids and log-probabilities that were sampled, and the policy version of each token.
- Loading weights never drops a request: requests in flight continue with the new weights.
- After a failure every call raises `EngineFailed`; a failed engine never samples with weights of an unknown version.
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

    from services.weights import Delivery
    from services.weights.collective import Incoming


class EngineFailed(AnchorageError):
    """The inference engine cannot start, has stopped working, or cannot load a policy version."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response.

    Attributes:
        token_ids: the R sampled tokens, including end-of-sequence if it was sampled.
        logprobs: R log-probabilities (nats) under the sampling distribution at the sampling temperature.
        versions: policy versions of the tokens, in order; their token counts sum to R.
        text: the decoded response without EOS and padding, but with other special tokens.
        finished: whether the response ended by itself, not at the token limit.
        stopped_by: the text of `stop` that ended the response (its tokens are the last ones, and `text` has it), or the
            stop token if that is not end-of-sequence; else None.

    Example: the policy says `go left`; version 8 was loaded after the first token.

        token_ids   [91, 407, 2]        go, left, <eos>
        logprobs    [-0.1, -0.7, -0.01]
        versions    (VersionSpan(7, 1), VersionSpan(8, 2))
        text        "go left"
        finished    True
        stopped_by  None
    """

    token_ids: list[int]
    logprobs: list[float]
    versions: tuple[VersionSpan, ...]
    text: str
    finished: bool
    stopped_by: int | str | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start of an engine.

    Attributes:
        responses: number of finished responses.
        response_tokens: their sampled tokens.
        prompt_tokens: tokens of their prompts.
        cached_tokens: tokens of the prompts that were found in the prefix cache.
        running: number of requests in flight.
        updates: number of weight updates.
        update_seconds: total time in which generation was paused for them.
        kv_use: share of the KV cache in use after the last step, 0 to 1; None if the engine does not report it.
        attention: name of the attention back end; empty if the engine does not report it.
    """

    responses: int = 0
    response_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    running: int = 0
    updates: int = 0
    update_seconds: float = 0.0
    kv_use: float | None = None
    attention: str = ""


class Sampler(Protocol):
    """The part of an engine that episodes use; see `InferenceEngine.generate`."""

    async def generate(
        self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int, stop: Sequence[str] = ()
    ) -> Sample: ...


class InferenceEngine(ABC):
    """Samples responses of one policy for many concurrent callers."""

    @property
    @abstractmethod
    def version(self) -> int:
        """Policy version that samples; 0 for the weights of the model folder."""

    @abstractmethod
    async def start(self) -> None:
        """Load the model. A second call waits for the same start.

        Raises:
            ModelUnavailable: the model folder cannot be loaded.
            EngineFailed: the engine cannot start.
        """

    @abstractmethod
    async def generate(
        self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int, stop: Sequence[str] = ()
    ) -> Sample:
        """Sample one response. Cancelling the call drops the request.

        Args:
            prompt_ids: token ids of the prompt.
            temperature: of sampling.
            max_tokens: longest response.
            seed: of sampling, in [0, 2^63).
            stop: texts that end the response once it contains one of them. The tokens that complete it are kept.

        Raises:
            ValueError: the prompt does not fit the model's context.
            EngineFailed: the engine is stopped or broken.
        """

    @abstractmethod
    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the weights; requests in flight continue.

        Args:
            version: policy version of the weights.
            tensors: in host memory, by Hugging Face names; the whole model or adapters.

        Raises:
            EngineFailed: the weights do not fit the model; the engine is unusable from then on.
        """

    async def load_delivery(self, delivery: Delivery) -> None:
        """Replace the weights by a version that is in this node's memory; otherwise as `load_weights`."""
        await self.load_weights(delivery.version.version, delivery.tensors())

    async def load_initial(self) -> None:
        """Replace the weights by those of the model's folder, as version 0; otherwise as `load_weights`."""
        raise EngineFailed("this inference engine cannot load the weights of model.path again")

    async def receive_weights(self, incoming: Incoming) -> None:
        """Join a collective transfer and replace the weights by those received; requests in flight continue.

        Raises:
            TransferLost: the transfer did not start; nothing has changed.
            EngineFailed: this engine does not support it, or the weights do not fit; it is unusable from then on.
        """
        raise EngineFailed("this inference engine does not support weights.channel=nccl or gloo")

    async def sleep(self) -> None:
        """Give memory back until the next load, which wakes the engine. Requests in flight, and new ones, wait for it.

        Raises:
            EngineFailed: this engine does not support it, or it failed.
        """
        raise EngineFailed("this inference engine does not support rollout.share_gpus=turns")

    @abstractmethod
    async def stop(self) -> None:
        """Drop requests in flight and release the model. Idempotent."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """Counters since the start."""
