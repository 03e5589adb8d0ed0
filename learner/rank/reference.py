"""Reference policy of one rank: the initial policy, frozen, kept where `learner.reference` says.

With LoRA it is the engine's own model without its adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from learner.batching import MicroBatch
from learner.rank.engine_deepspeed import DeepSpeedEngine, configured_policy, sharded
from learner.rank.policy import inputs
from services.config.tree import Config


class Reference:
    """The reference policy. Collective like the engine; usable only within `on_device`.

    Args:
        config: of the run.
        engine: of the same rank, already loaded.
    """

    def __init__(self, config: Config, engine: DeepSpeedEngine) -> None:
        self._kind = "adapters" if config.model.lora is not None else config.learner.reference
        self._engine = engine
        if self._kind == "adapters":
            return
        frozen = configured_policy(config, engine.parity.route).requires_grad_(False)
        self._policy: Any = frozen.eval()
        if self._kind == "resident":
            frozen.to(engine.device)
        elif self._kind == "sharded":
            self._policy = sharded(frozen, config)

    def leave_device(self) -> None:
        """Move a resident policy to host memory. One that is sharded cannot be moved, and is refused before."""
        if self._kind == "resident":
            self._policy.to("cpu")

    def return_to_device(self) -> None:
        """Move it back."""
        if self._kind == "resident":
            self._policy.to(self._engine.device)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """A context in which an off-loaded policy is on the engine's device."""
        if self._kind == "offloaded":
            self._policy.to(self._engine.device)
        try:
            yield
        finally:
            if self._kind == "offloaded":
                self._policy.to("cpu")

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-probabilities of the batch's response tokens, in nats: float32 [T], on the engine's device."""
        if self._kind == "adapters":
            return self._engine.logprobs(batch, adapted=False)
        logprob: Tensor = self._policy(*inputs(batch, self._engine.device))[0]
        return logprob
