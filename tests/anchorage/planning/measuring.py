"""What the backward pass of the real policy keeps, in bytes: the unique storages that autograd saves."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from anchorage.planning.activations import Pass
from learner.batching import MicroBatch, Row, plan
from learner.rank.forward import recompute_layers
from learner.rank.lora import adapt
from learner.rank.policy import DTYPES, Policy, inputs
from services.config.tree import LoraConfig
from tests.models import random_model


class Storages:
    """Unique storages, by their address while they live.

    Attributes:
        held: the tensors, so that no address is used twice.
    """

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self.held: list[torch.Tensor] = []

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._seen[storage.data_ptr()] = storage.nbytes()
        self.held.append(tensor)

    def drop(self, tensor: torch.Tensor) -> None:
        self._seen.pop(tensor.untyped_storage().data_ptr(), None)

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())


@contextmanager
def rotary_outputs(lm: Any, storages: Storages) -> Iterator[None]:
    """Add what rotary modules return: layers that are recomputed keep it outside of autograd."""
    hooks = [
        module.register_forward_hook(lambda _, __, out: [storages.add(t) for t in out] and None)
        for name, module in lm.named_modules()
        if name.endswith("rotary_emb")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def policy_of(config: Any, dtype: str, *, checkpointing: bool, adapters: int, max_logits: int) -> Policy:
    policy = Policy(random_model(config).to(DTYPES[dtype]), 1.0, max_logits)
    if adapters:
        adapt(policy, LoraConfig(rank=adapters), _SameNames())  # type: ignore[arg-type]
    if checkpointing:
        recompute_layers(policy.lm)
    return policy


class _SameNames:
    """In place of a `DiskForm`: names on disk are those in memory."""

    def convert(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors


def rows(count: int, length: int, response: int, vocabulary: int, shared: int = 0) -> list[Row]:
    """Random rows; the first `shared` tokens are the same in all of them."""
    rng = np.random.default_rng(1)
    start = rng.integers(1, vocabulary, shared)
    tokens = [np.concatenate([start, rng.integers(1, vocabulary, length - shared)]) for _ in range(count)]
    return [Row(own.astype(np.int32), np.zeros(response, np.float32), 0.0) for own in tokens]


def line(count: int, length: int, response: int, vocabulary: int, shared: int = 0) -> MicroBatch:
    """One micro-batch of these rows."""
    ((batch,),) = plan(rows(count, length, response, vocabulary, shared), 1, 2 * count * length)
    return batch


def kept_bytes(policy: Policy, batch: MicroBatch) -> int:
    """Bytes that the backward pass of the policy keeps, without parameters."""
    storages = Storages()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages.add(tensor)
        return tensor

    with rotary_outputs(policy.lm, storages), saved_tensors_hooks(keep, lambda tensor: tensor):
        logprob, _ = policy(*inputs(batch, torch.device("cpu")))
    for tensor in (*policy.parameters(), *policy.buffers()):
        storages.drop(tensor)
    kept = storages.bytes
    del logprob
    gc.collect()
    return kept


def predicted(shape: Any, batch: MicroBatch, dtype: str, **more: Any) -> Pass:
    """The pass of a micro-batch on a CPU."""
    length = int(batch.input_ids.shape[1])
    read = int(batch.path_starts[-1])
    own, whole = np.diff(batch.starts), np.diff(batch.path_starts)
    masks = int((own * whole)[own != whole].sum())
    return Pass(shape, DTYPES[dtype].itemsize, length, read, len(batch.targets), attention="each", masks=masks, **more)
