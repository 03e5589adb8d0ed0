"""The training engine of one rank. The only file that knows DeepSpeed.

Invariants
- `accumulate` may be called any number of times before `step`, equally often on every rank. Losses are sums over one
  token count for the whole step: DeepSpeed's averaging over ranks is undone here, and it scales by nothing else.
- The learning rate is a function of the number of optimizer steps done, which the checkpoint holds.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.batching import MicroBatch
from learner.losses import LossTerms
from learner.policy import DTYPES, Policy, load_policy
from learner.schedule import rate_factor
from services.config.tree import Config
from services.errors import CheckpointFailed

TAG = "engine"
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)

LossFunction = Callable[[Tensor, Tensor], LossTerms]
"""(log-probability, entropy) of a micro-batch's T response tokens to its loss."""


def connect(rank: int, ranks: int, address: str, port: int) -> None:
    """Join the group of ranks (gloo on CPU, NCCL on GPU). Blocks until all have joined."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # On a CPU it would otherwise compile a shared-memory kernel here, and fail where there is no compiler.
        deepspeed.ops.__compatible_ops__ = {}
    # DeepSpeed reads these; a rank sees its own GPU only, so its local rank is 0.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        auto_mpi_discovery=False,
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=ranks,
        timeout=COLLECTIVE_TIMEOUT,
        verbose=False,
    )


class DeepSpeedEngine:
    """A policy under DeepSpeed ZeRO. Every method is collective: all ranks call it, in the same order."""

    def __init__(self, config: Config) -> None:
        import deepspeed

        self._config = config
        self._ranks = config.learner.ranks
        torch.manual_seed(config.run.seed)
        policy = load_policy(config.model.path, config.model.dtype, config.rollout.temperature)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._engine, *_ = deepspeed.initialize(
            model=policy.to(self._device), optimizer=_adamw(policy, config), config=_deepspeed_config(config)
        )
        self._engine.train()

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return int(self._engine.global_steps)

    @property
    def device(self) -> torch.device:
        return self._device

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> Tensor:
        """float32 [T], on the engine's device."""
        logprob: Tensor = self._engine(*inputs(batch, self._device))[0]
        return logprob.detach()

    def accumulate(self, batch: MicroBatch, loss: LossFunction) -> LossTerms:
        """Forward and backward pass; the gradient is added to what `step` will apply."""
        entropy_gradient = self._config.loss.entropy_coef > 0
        terms = loss(*self._engine(*inputs(batch, self._device), entropy_gradient))
        self._engine.backward(terms.loss * self._ranks, scale_wrt_gas=False)
        return terms

    def step(self) -> dict[str, float]:
        """Clip, apply and clear the gradient; answers `learning_rate` and, where DeepSpeed knows it, `grad_norm`."""
        rate = self._config.optimizer.lr * rate_factor(self.steps, self._config)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return {"learning_rate": rate} | ({} if norm is None else {"grad_norm": float(norm)})

    def weights(self) -> dict[str, Tensor]:
        """The whole model under its Hugging Face names, on the CPU in `model.dtype`; empty on all ranks but 0."""
        import deepspeed

        policy: Policy = self._engine.module
        wanted = torch.distributed.get_rank() == 0
        dtype = DTYPES[self._config.model.dtype]
        gathered: dict[str, Tensor] = {}
        # Tied parameters come once, under their first name, as Hugging Face saves them.
        for name, parameter in policy.lm.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._config.learner.zero_stage == 3):
                if wanted:
                    gathered[name] = parameter.detach().to("cpu", dtype, copy=True).contiguous()
        return gathered

    def checkpoint_bytes(self) -> int:
        """About what `save` writes, all ranks together: parameters, float32 copies of them, and two moments."""
        parameters = self._engine.module.parameters()
        return 16 * sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in parameters)

    def save(self, folder: Path) -> None:
        """Write parameters, optimizer state, step count and random state.

        Raises:
            CheckpointFailed: the files could not be written.
        """
        state = {"random": torch.get_rng_state()}
        try:
            self._engine.save_checkpoint(str(folder), tag=TAG, client_state=state, save_latest=False)
        except (OSError, RuntimeError) as error:
            raise CheckpointFailed(f"cannot write the checkpoint to {folder}: {_brief(error)}") from error

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote, with the same number of ranks and ZeRO stage.

        Raises:
            CheckpointFailed: the files are missing, broken or do not fit.
        """
        try:
            path, state = self._engine.load_checkpoint(str(folder), tag=TAG)
        except Exception as error:
            raise CheckpointFailed(f"cannot read the checkpoint in {folder}: {_brief(error)}") from error
        if path is None:
            raise CheckpointFailed(f"{folder} holds no checkpoint of the engine")
        torch.set_rng_state(state["random"])

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def inputs(batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What `Policy.forward` takes."""
    arrays = (batch.input_ids, batch.positions, batch.targets)
    first, second, third = (torch.tensor(array, device=device) for array in arrays)
    return first, second, third


def _adamw(policy: Policy, config: Config) -> torch.optim.Optimizer:
    # PyTorch's own AdamW: DeepSpeed's variants are compiled at first use, and need a compiler where the run is.
    return torch.optim.AdamW(
        policy.parameters(),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )


def _deepspeed_config(config: Config) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # `step` alone ends an accumulation: the number of micro-batches differs from update to update.
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_optimization": {"stage": config.learner.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "steps_per_print": 2**31,
    }


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
