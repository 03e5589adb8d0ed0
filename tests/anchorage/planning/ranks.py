"""One rank of a group that measures its own states: `python -m tests.anchorage.planning.ranks RANK RANKS PORT FILE`.

FILE holds a list of configurations as JSON. For each the rank makes an update of one micro-batch with the real engine
and prints a line of JSON: bytes of parameters, gradients and optimizer state, by kind.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from anchorage.planning.states import BUCKET
from learner.rank.engine_deepspeed import DeepSpeedEngine, connect
from learner.rank.losses import LossTerms
from services.config.tree import Config
from tests.anchorage.planning.measuring import line

MASTERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
GRADIENTS = (
    "averaged_gradients",
    "all_grad_tensors",
    "fp32_groups_gradients_flat",
    "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in nested lists and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)


def nbytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the unique storages; numbers of a step's count are left out."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None and t.numel() > 1
    }
    return sum(storages.values())


def everything(engine: Any) -> int:
    """Bytes of all tensors that the engine and its optimizer hold, without DeepSpeed's bucket."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = list(engine.module.parameters())
    own = [getattr(p, name, None) for p in parameters for name in ("data", "grad", "grad_accum", "ds_tensor")]
    state = [list(each.values()) for each in inner.state.values()]
    masters = [p for group in inner.param_groups for p in group["params"]]
    held = [*own, *masters, *(m.grad for m in masters), *tensors_in(state), *tensors_in(vars(optimizer))]
    return nbytes(t for t in held if t is not None and t.untyped_storage().nbytes() < BUCKET)


def loss(logprob: torch.Tensor, entropy: torch.Tensor) -> LossTerms:
    return LossTerms(loss=-logprob.mean())


def measure(config: Config) -> dict[str, int]:
    """Bytes by kind: gradients after a backward pass, all after another, the rest after the optimizer step."""
    engine = DeepSpeedEngine(config)
    batch = line(2, 20, 4, engine._engine.module.lm.config.vocab_size)

    engine.accumulate(batch, loss)
    optimizer: Any = engine._engine.optimizer
    parameters = list(engine._engine.module.parameters())
    kept = [getattr(optimizer, name, None) for name in GRADIENTS]
    own = [getattr(p, name, None) for p in parameters for name in ("grad", "grad_accum")]
    gradients = nbytes([*tensors_in(kept), *own])
    engine.step()
    inner = optimizer if config.learner.zero_stage == 0 else optimizer.optimizer
    masters = [getattr(optimizer, name, None) for name in MASTERS]
    state = [list(each.values()) for each in inner.state.values()]
    sharded = config.learner.zero_stage == 3
    found = {
        "parameters": nbytes(p.ds_tensor if sharded else p for p in parameters),
        "gradients": gradients,
        "optimizer": nbytes([*tensors_in(masters), *tensors_in(state)]),
    }
    engine.accumulate(batch, loss)
    found["everything"] = everything(engine._engine)
    del engine, optimizer, inner, parameters, kept, own, masters, state
    gc.collect()
    return found


def main() -> None:
    rank, ranks, port, file = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    logging.disable(logging.CRITICAL)
    connect(rank, ranks, "127.0.0.1", port)
    for tree in json.loads(file.read_text()):
        found = measure(Config.model_validate(tree))
        if rank == 0:
            print(json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
