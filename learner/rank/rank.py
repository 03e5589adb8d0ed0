"""One data-parallel rank of the learner: a Ray actor around a training engine.

Invariants
- All ranks get the same calls in the same order; a rank that cannot go on raises, and all of them are started afresh.
- π_old is the policy at the start of the update: free when the update is one optimizer step, one more forward pass
  when it is several, and not needed at all without an importance cap.
"""

from __future__ import annotations

import math
import os
import socket
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from learner.batching import MicroBatch
from learner.prepare import OptimizerStep
from learner.rank.losses import LossTerms, TokenBatch, denominator, load_loss, policy_loss
from learner.rank.parity import Parity
from services.config.tree import Config
from services.errors import UpdateNotFinite
from services.plugins import make_importable


class Rank:
    """Runs in its own process. `connect` first; then every method is collective over the ranks."""

    def __init__(self, config: Config, number: int) -> None:
        torch.set_num_threads(config.learner.threads)
        self._config = config
        self._number = number

    def address(self) -> tuple[str, int, int]:
        """(IP address, a free port, process id) of this rank."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1], os.getpid()

    def connect(self, host: str, port: int) -> int:
        """Join the other ranks and load the model; answers the size of a checkpoint of the engine in bytes.

        Raises:
            PluginError: the loss function cannot be loaded on this node.
            ModelUnavailable: the model cannot be loaded, or the learner would not train what it computes.
        """
        from learner.rank.engine_deepspeed import DeepSpeedEngine, connect
        from learner.rank.reference import Reference

        make_importable(self._config.plugins.folders)
        self._loss = load_loss(self._config.loss)
        connect(self._number, self._config.learner.ranks, host, port)
        self._engine = DeepSpeedEngine(self._config)
        self._reference = Reference(self._config, self._engine) if self._config.loss.kl_coef > 0 else None
        return self._engine.checkpoint_bytes()

    def parity(self) -> Parity:
        """What `connect` measured of the model, see `learner.rank.parity`."""
        return self._engine.parity

    def update(self, steps: Sequence[OptimizerStep]) -> dict[str, float]:
        """Take the optimizer steps of one update.

        Returns:
            This rank's token sums of the loss metrics (`tokens` is their denominator) as `sum/NAME`, their maxima as
            `max/NAME`, and the last optimizer step's own figures as they are.

        Raises:
            UpdateNotFinite: on every rank, when the first optimizer step's loss or gradient is not finite; nothing has
                changed.
            RuntimeError: the same of a later one; the ones before it were taken.
        """
        old = self._old_logprobs(steps)
        reference = self._reference_logprobs(steps)
        limit = self._config.model.max_response_tokens
        maxima: dict[str, Tensor] = {}
        sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self._engine.device))
        figures: dict[str, float] = {}
        for number, step in enumerate(steps):
            total = denominator(self._config.loss, step.total_tokens, step.total_rows, limit)
            for batch in step.batches:
                own_old, own_reference = old.get(id(batch)), reference.get(id(batch))
                terms = self._accumulate(batch, own_old, own_reference, total, first=number == 0)
                for name, value in terms.sums.items():
                    sums[name] += value
                for name, value in terms.maxima.items():
                    maxima[name] = torch.maximum(maxima.get(name, value), value)
                sums["loss"] += terms.loss.detach()
            figures = self._step(number, len(steps))
        figures |= {f"max/{name}": float(value) for name, value in maxima.items()}
        return figures | {f"sum/{name}": float(value) for name, value in sums.items()}

    def finite(self, steps: Sequence[OptimizerStep]) -> bool:
        """Whether this rank's share has finite log-probabilities under the policy."""
        scored = [self._engine.logprobs(batch).isfinite().all() for step in steps for batch in step.batches]
        return all(bool(each) for each in scored)

    def gap(self, batches: Sequence[MicroBatch]) -> tuple[float, float, int]:
        """Differences of the batches' log-probabilities from the sampler's: largest, sum (nats), and their number."""
        largest, total, count = 0.0, 0.0, 0
        for batch in batches:
            counted = torch.tensor(batch.weight) > 0
            scored = self._engine.logprobs(batch).float().cpu()
            off = (scored - torch.tensor(batch.behaviour)).abs().nan_to_num(math.inf)[counted]
            largest = max(largest, float(off.max()) if len(off) else 0.0)
            total, count = total + float(off.sum()), count + len(off)
        return largest, total, count

    def weights(self) -> dict[str, Tensor]:
        """The whole model on rank 0, nothing on the others."""
        return self._engine.weights()

    def save(self, folder: Path) -> None:
        self._engine.save(folder)

    def load(self, folder: Path) -> None:
        self._engine.load(folder)

    def _step(self, number: int, steps: int) -> dict[str, float]:
        try:
            return self._engine.step()
        except UpdateNotFinite as error:
            if number == 0:
                raise
            raise RuntimeError(f"optimizer step {number + 1} of {steps} in an update: {error}") from error

    def _accumulate(
        self, batch: MicroBatch, old: Tensor | None, reference: Tensor | None, total: float, *, first: bool
    ) -> LossTerms:
        config = self._config.loss
        old_is_current = config.importance_cap is not None and old is None

        def loss(logprob: Tensor, entropy: Tensor) -> LossTerms:
            arrays = (batch.behaviour, batch.advantage, batch.weight, batch.sequence)
            behaviour, advantage, weight, sequence = (torch.tensor(array, device=logprob.device) for array in arrays)
            tokens = TokenBatch(
                logprob=logprob,
                behaviour=behaviour,
                advantage=advantage,
                weight=weight,
                old=logprob.detach() if old_is_current else old,
                reference=reference,
                entropy=entropy,
                sequence=sequence,
                # Only before the first optimizer step is π the version that sampled them.
                fresh=torch.tensor(batch.fresh, device=logprob.device) if first else None,
            )
            return policy_loss(tokens, config, total, self._loss)

        return self._engine.accumulate(batch, loss)

    def _old_logprobs(self, steps: Sequence[OptimizerStep]) -> dict[int, Tensor]:
        """log π_old of each micro-batch, by its `id`, where it takes a forward pass of its own."""
        if self._config.loss.importance_cap is None or len(steps) == 1:
            return {}
        return {id(batch): self._engine.logprobs(batch) for step in steps for batch in step.batches}

    def _reference_logprobs(self, steps: Sequence[OptimizerStep]) -> dict[int, Tensor]:
        """log π_ref of each micro-batch, by its `id`, where the loss needs it."""
        if self._reference is None:
            return {}
        with self._reference.at_hand():
            return {id(batch): self._reference.logprobs(batch) for step in steps for batch in step.batches}
