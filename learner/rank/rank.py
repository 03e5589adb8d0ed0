"""One data-parallel rank of the learner: a Ray actor around a training engine.

Invariants
- All ranks get the same calls in the same order; a rank that becomes unusable raises, and all ranks are restarted.
- π_old is the policy at the start of the update. It costs nothing if the update is one optimizer step, one more forward
  pass if it is several, and is not needed without an importance cap.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from learner.batching import MicroBatch
from learner.checkpoint import export_policy, whole_policy, write_failure
from learner.prepare import OptimizerStep
from learner.rank.losses import LossTerms, TokenBatch, denominator, load_loss, policy_loss
from learner.rank.outbox import Outbox
from learner.rank.parity import Parity
from services.config.tree import Config
from services.errors import CheckpointFailed, UpdateNotFinite
from services.plugins import make_importable
from services.process import ReservedPort
from services.weights import WeightChannel
from services.weights.channel import new_file
from services.weights.collective import CollectiveChannel
from services.weights.digest import Digest
from services.weights.payload import unpack
from services.weights.processors import all_processors


class Rank:
    """A rank in its own process. Call `address` and `connect` first; then every method is collective over the ranks.

    Args:
        config: of the run.
        number: of this rank, from 0.
    """

    def __init__(self, config: Config, number: int) -> None:
        torch.set_num_threads(config.learner.threads)
        self._config = config
        self._number = number
        self._outbox: Outbox | None = None

    def address(self) -> tuple[str, int, int]:
        """(IP address, a port reserved until `connect`, process id) of this rank."""
        import ray

        host = ray.util.get_node_ip_address()
        self._reserved = ReservedPort(host)
        return host, self._reserved.number, os.getpid()

    def connect(self, host: str, port: int) -> int:
        """Join the other ranks and load the model. Returns the size of a checkpoint in bytes.

        Raises:
            PluginError: the loss function cannot be loaded on this node.
            ModelUnavailable: the model cannot be loaded, or the learner would train another function than it computes.
        """
        from learner.rank.engine_deepspeed import DeepSpeedEngine, connect
        from learner.rank.reference import Reference

        make_importable(self._config.plugins.folders)
        self._loss = load_loss(self._config.loss)
        with self._reserved:  # until the first rank listens at its port
            connect(self._number, self._config.learner.ranks, host, port)
        self._engine = DeepSpeedEngine(self._config)
        self._reference = Reference(self._config, self._engine) if self._config.loss.kl_coef > 0 else None
        return self._engine.checkpoint_bytes()

    def parity(self) -> Parity:
        """Measurement of the model by `connect`, see `learner.rank.parity`."""
        return self._engine.parity

    def update(self, steps: Sequence[OptimizerStep]) -> dict[str, float]:
        """Take the optimizer steps of one update.

        Returns:
            This rank's sums of the loss metrics over tokens as `sum/NAME` (`sum/tokens` is their denominator), their
            maxima as `max/NAME`, and the figures of the last optimizer step.

        Raises:
            UpdateNotFinite: on every rank, if the loss or gradient of the first optimizer step is not finite; nothing
                has changed.
            RuntimeError: likewise for a later optimizer step; the ones before it were applied.
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
        """Whether the policy's log-probabilities of this rank's share are all finite."""
        scored = [self._engine.logprobs(batch).isfinite().all() for step in steps for batch in step.batches]
        return all(bool(each) for each in scored)

    def gap(self, batches: Sequence[MicroBatch]) -> tuple[float, float, int]:
        """Compare the policy's log-probabilities with the sampler's.

        Returns:
            Largest absolute difference and sum of all, in nats, and their number. NaN counts as infinite.
        """
        largest, total, count = 0.0, 0.0, 0
        for batch in batches:
            counted = torch.tensor(batch.weight) > 0
            scored = self._engine.logprobs(batch).float().cpu()
            off = (scored - torch.tensor(batch.behaviour)).abs().nan_to_num(math.inf)[counted]
            largest = max(largest, float(off.max()) if len(off) else 0.0)
            total, count = total + float(off.sum()), count + len(off)
        return largest, total, count

    def publish(self, version: int, channel: WeightChannel) -> None:
        """Take a snapshot of the weights and begin to send it; rank 0 does that in the background.

        Raises:
            WeightsUnavailable: on rank 0, if there is no room for it, or the snapshot before could not be sent.
            RunTaken: on rank 0, if the snapshot before was not announced because another process owns the run.
        """
        if self._outbox is None or not self._outbox.channel.same(channel):
            if self._outbox is not None:
                self._outbox.announced(None)
                self._outbox.close()
            self._outbox = Outbox(channel)
        # On a GPU the digest costs next to nothing there, and no second passage of the weights later.
        seen = Digest() if isinstance(channel, CollectiveChannel) and self._engine.device.type == "cuda" else None
        with all_processors():
            snapshot = self._engine.snapshot(self._outbox.room, seen)
        if snapshot is not None:
            self._outbox.send(version, snapshot, None if seen is None else seen.hex())

    def published(self, timeout_s: float) -> bool:
        """Whether the last snapshot is announced; waits up to `timeout_s` for it. Not collective.

        Raises:
            WeightsUnavailable: it could not be sent.
        """
        return self._outbox is None or self._outbox.announced(timeout_s)

    def save(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint. Raises CheckpointFailed."""
        self._engine.save(folder)

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, on rank 0. Raises CheckpointFailed."""
        snapshot = self._engine.snapshot(new_file)
        if snapshot is None:
            return
        model = self._config.model.path
        try:
            export_policy(folder, whole_policy(unpack(snapshot.payload), model), model)
        except OSError as error:
            raise CheckpointFailed(f"cannot write the policy to {folder}: {write_failure(error)}") from error

    def leave_device(self) -> None:
        """Move all states to host memory: until `return_to_device` the device is another's."""
        self._engine.leave_device()
        if self._reference is not None:
            self._reference.leave_device()

    def return_to_device(self) -> None:
        """Move them back."""
        self._engine.return_to_device()
        if self._reference is not None:
            self._reference.return_to_device()

    def load(self, folder: Path) -> None:
        """Restore a checkpoint. Raises CheckpointFailed."""
        self._engine.load(folder)

    def _step(self, number: int, steps: int) -> dict[str, float]:
        """Apply optimizer step `number` of `steps`. Only before the first is a failed update without consequences."""
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
                # Only before the first optimizer step is π still the version that sampled them.
                fresh=torch.tensor(batch.fresh, device=logprob.device) if first else None,
            )
            return policy_loss(tokens, config, total, self._loss)

        return self._engine.accumulate(batch, loss)

    def _old_logprobs(self, steps: Sequence[OptimizerStep]) -> dict[int, Tensor]:
        """log π_old, float32 [T], of each micro-batch by its `id`; empty if it needs no forward pass of its own."""
        if self._config.loss.importance_cap is None or len(steps) == 1:
            return {}
        return {id(batch): self._engine.logprobs(batch) for step in steps for batch in step.batches}

    def _reference_logprobs(self, steps: Sequence[OptimizerStep]) -> dict[int, Tensor]:
        """log π_ref, float32 [T], of each micro-batch by its `id`; empty if the loss does not use it."""
        if self._reference is None:
            return {}
        with self._reference.on_device():
            return {id(batch): self._reference.logprobs(batch) for step in steps for batch in step.batches}
