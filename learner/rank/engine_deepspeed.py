"""Training engine of one rank. The only file that depends on DeepSpeed.

Invariants
- `accumulate` may be called any number of times before `step`, equally often on every rank. Losses are normalised by
  one token count for the whole step: DeepSpeed's averaging over ranks is undone here, and nothing else is scaled.
- A step whose gradient is not finite is refused on every rank, in every ZeRO stage, and changes nothing.
- The learning rate is a function of the number of optimizer steps done, which the checkpoint holds.
- A checkpoint holds whole tensors under the parameters' names, not the shards of each rank: it can be loaded with any
  number of ranks and any ZeRO stage.
"""

from __future__ import annotations

import datetime
import importlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from learner.batching import MicroBatch
from learner.rank import lora
from learner.rank.disk_names import DiskForm, persistent_buffers
from learner.rank.forward import recompute_layers
from learner.rank.losses import LossTerms
from learner.rank.parity import Parity, require_exact
from learner.rank.policy import DTYPES, LOGITS_PER_MIB, Policy, Route, inputs, load_policy
from learner.rank.schedule import rate_factor
from learner.rank.shards import ShardReader, ShardWriter
from services.config.tree import Config
from services.errors import AnchorageError, CheckpointFailed, UpdateNotFinite
from services.model_folder import stored_parameters
from services.weights.digest import Digest
from services.weights.memory import Snapshot
from services.weights.payload import Layout, fill

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
LOT_BYTES = 256 * 2**20
"""Sharded parameters that are gathered together for a snapshot."""

log = logging.getLogger(__name__)

Room = TypeVar("Room", bound=Snapshot)

LossFunction = Callable[[Tensor, Tensor], LossTerms]
"""(log-probability, entropy), float32 [T] each, of a micro-batch's response tokens to its loss."""


def connect(rank: int, ranks: int, address: str, port: int) -> None:
    """Join the process group of the ranks (gloo on CPU, NCCL on GPU). Blocks until all have joined.

    Args:
        rank: number of this rank.
        ranks: number of all.
        address: IP address of rank 0.
        port: free port there.
    """
    import deepspeed

    _import_muon()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # On a CPU it would compile a shared-memory kernel here, and fail without a compiler.
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


def _import_muon() -> None:
    """Import DeepSpeed's optimizer Muon without compiling it, before DeepSpeed imports it at initialisation.

    Muon's functions are decorated with `torch.compile`, which loads the compiler: six seconds of processor time at the
    start of every rank, for an optimizer that is not used.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


class DeepSpeedEngine:
    """A policy under DeepSpeed ZeRO. Every method is collective: all ranks call it, in the same order.

    Attributes:
        parity: what was measured of the model on loading, and the route that rows take on every rank.

    Raises:
        ModelUnavailable: the model cannot be loaded, or the learner would train another function than it computes.
    """

    parity: Parity

    def __init__(self, config: Config) -> None:
        import deepspeed

        self._config = config
        self._ranks = config.learner.ranks
        self._stage = config.learner.zero_stage
        torch.manual_seed(config.run.seed)
        policy = configured_policy(config, Route(packed=False))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not config.learner.offload_parameters:
            policy.to(self._device)
        # Before DeepSpeed shards the parameters: here each rank has the whole model, so measuring is not collective.
        context = config.model.max_prompt_tokens + config.model.max_response_tokens
        parity = require_exact(policy, config.learner.packing, context)
        policy.route = self._agreed(parity.route)
        self.parity = replace(parity, route=policy.route)
        self._disk = DiskForm(policy.lm, config.model.path)
        adapters = config.model.lora
        self._adapters = lora.adapt(policy, adapters, self._disk) if adapters is not None else None
        if config.learner.activation_checkpointing:
            recompute_layers(policy.lm)
        optimizer = _adamw(policy, config)
        if self._stage == 0:
            optimizer = _refusing(optimizer, config.optimizer.grad_clip)
        self._engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=_deepspeed_config(config))
        self._engine.train()

    def _agreed(self, route: Route) -> Route:
        """The fastest route that is exact on every rank. Collective."""
        votes = torch.tensor([route.packed, route.halves, route.prefixes], dtype=torch.int32, device=self._device)
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
        packed, halves, prefixes = (bool(vote) for vote in votes.tolist())
        return Route(packed=packed, halves=halves, prefixes=prefixes)

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return int(self._engine.global_steps)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def optimizer_name(self) -> str:
        """Class of the optimizer below ZeRO's, with its package."""
        zero = self._engine.optimizer
        kind = type(getattr(zero, "optimizer", zero))
        return f"{kind.__module__.partition('.')[0]} {kind.__name__}"

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch, *, adapted: bool = True) -> Tensor:
        """Log-probabilities of the batch's response tokens, without a gradient.

        Args:
            batch: T response tokens.
            adapted: whether the model's adapters, if it has any, take part.

        Returns:
            float32 [T], in nats, on the engine's device.
        """
        with nullcontext() if adapted else lora.switched_off(self._engine.module):
            logprob: Tensor = self._engine(*inputs(batch, self._device))[0]
        return logprob.detach()

    def accumulate(self, batch: MicroBatch, loss: LossFunction) -> LossTerms:
        """Run forward and backward pass; add the gradient to what `step` will apply."""
        entropy_gradient = self._config.loss.entropy_coef > 0
        terms = loss(*self._engine(*inputs(batch, self._device), entropy_gradient))
        # A non-finite loss can have a finite gradient, and the step checks only that: NaN makes the gradient NaN too.
        sound = torch.where(terms.loss.detach().isfinite(), 1.0, math.nan)
        self._engine.backward(terms.loss * sound * self._ranks, scale_wrt_gas=False)
        return terms

    def step(self) -> dict[str, float]:
        """Clip, apply and clear the gradient.

        Returns:
            `learning_rate` and, where DeepSpeed computes it, `grad_norm`.

        Raises:
            UpdateNotFinite: on every rank, if a loss or the gradient's norm is not finite. The gradient is cleared;
                nothing else has changed.
        """
        rate = self._config.optimizer.lr * rate_factor(self.steps, self._config)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        if not self._engine.was_step_applied():
            self._engine.global_steps -= 1  # DeepSpeed counts skipped steps too
            raise UpdateNotFinite("the loss or the gradient is not finite")
        norm = self._engine.get_global_grad_norm()
        return {"learning_rate": rate} | ({} if norm is None else {"grad_norm": float(norm)})

    @torch.no_grad()
    def snapshot(self, room: Callable[[int], Room], seen: Digest | None = None) -> Room | None:
        """Copy the weights for the actors, in `model.dtype`, into memory of their own.

        Args:
            room: returns memory of so many bytes; called on rank 0.
            seen: gets every tensor of rank 0, where it is before the copy.

        Returns:
            On rank 0 that memory, filled: all weights in their form on disk, or the adapters in the form of
            `services.weights.adapter`. None on the other ranks.

        Raises:
            AnchorageError: what `room` raised. The other ranks are not affected.
        """
        taken: Room | None = None
        places: dict[str, Tensor] = {}
        failure: AnchorageError | None = None
        for tensors in self._published():
            if taken is None and failure is None and tensors:
                forms = tensors if self._adapters else self._disk.form(DTYPES[self._config.model.dtype])
                layout = Layout.of(forms)
                try:
                    taken = room(layout.nbytes)
                except AnchorageError as error:  # the other ranks still gather
                    failure = error
                    continue
                places = taken.places(layout)
            if taken is not None:
                fill(places, tensors.items())
                if seen is not None:
                    seen.include(tensors.items())
        if failure is not None:
            raise failure
        return taken

    def _published(self) -> Iterator[dict[str, Tensor]]:
        """On rank 0 the weights for the actors, some at a time; each lot is valid until the next. Collective."""
        wanted = torch.distributed.get_rank() == 0
        dtype = DTYPES[self._config.model.dtype]
        trained = dict(self._trained())
        buffers = {} if self._adapters else persistent_buffers(self._engine.module.lm)
        for lot in _lots([tuple(trained)] if self._adapters else self._disk.parts, trained):
            with self._whole([trained[name] for part in lot for name in part if name in trained]):
                for part in lot if wanted else ():
                    own = {n: trained[n].detach().to(dtype) if n in trained else buffers[n] for n in part}
                    yield self._adapters.broadcast(own) if self._adapters else self._disk.published(own)

    def checkpoint_bytes(self) -> int:
        """Approximate size of a checkpoint in bytes: float32 parameters, two moments of each, and the whole policy."""
        trained = sum(int(getattr(parameter, "ds_numel", parameter.numel())) for _, parameter in self._trained())
        whole = max(trained, stored_parameters(self._config.model.path))
        return 12 * trained + DTYPES[self._config.model.dtype].itemsize * whole

    def save(self, folder: Path) -> None:
        """Write parameters, optimizer state, step count and every rank's random state into an existing folder.

        Raises:
            CheckpointFailed: the files cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        rank = torch.distributed.get_rank()
        writer = ShardWriter(folder) if rank == 0 else None
        if self.steps == 0:
            self._make_moments(0)
        try:
            for name, parameter in self._trained():
                for part in (MASTER, *MOMENTS):
                    tensor = self._read(parameter, part)
                    if writer is not None:
                        writer.add(f"{part}/{name}", tensor)
            if writer is not None:
                writer.flush()
                (folder / "engine.json").write_text(json.dumps({"steps": self.steps, "ranks": self._ranks}))
            save_file(_random_state(), folder / f"random-{rank:05d}.safetensors")
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointFailed(f"cannot write the checkpoint to {folder}: {_brief(error)}") from error

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, with any number of ranks and any ZeRO stage.

        Raises:
            CheckpointFailed: the files are missing, damaged or belong to another model.
        """
        try:
            steps = int(json.loads((folder / "engine.json").read_text())["steps"])
            stored = ShardReader(folder)
            own = {f"{part}/{name}" for name, _ in self._trained() for part in (MASTER, *MOMENTS)}
            if own != stored.names:
                raise ValueError(f"it has other parameters than the model, such as {min(own ^ stored.names)}")
            self._make_moments(steps)
            for name, parameter in self._trained():
                for part in (MASTER, *MOMENTS):
                    self._write(parameter, part, stored.get(f"{part}/{name}").to(self._device))
            self._restore_random(folder / f"random-{torch.distributed.get_rank():05d}.safetensors", steps)
        except Exception as error:
            raise CheckpointFailed(f"cannot read the checkpoint in {folder}: {_brief(error)}") from error
        self._engine.global_steps = steps

    def leave_device(self) -> None:
        """Move all states to host memory. Only `return_to_device` may be called next. Collective."""
        from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum

        pinned = torch.cuda.is_available()
        include = None
        if self._stage == 3:
            # DeepSpeed itself moves masters and moments of its FusedAdam only, which needs a compiler for CUDA.
            include = set(OffloadStateTypeEnum) - {OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states}
        for tensor in self._moved_here():
            host = tensor.data.to("cpu")
            tensor.data = host.pin_memory() if pinned else host
        self._engine.offload_states(include=include, device=OffloadDeviceEnum.cpu, pin_memory=pinned)
        if pinned:
            torch.cuda.empty_cache()

    def return_to_device(self) -> None:
        """Undo `leave_device`. Collective."""
        for tensor in self._moved_here():
            tensor.data = tensor.data.to(self._device)
        self._engine.reload_states()
        zero = self._engine.optimizer
        if self._stage < 3:
            # The moments are new tensors now, which what reads them by parameter does not know.
            zero._hp_optimizer_states_linked = False
            if self.steps > 0:
                zero._lazy_init_hp_params_optimizer_state()

    def _moved_here(self) -> list[Tensor]:
        """What DeepSpeed does not move: frozen parameters; in stage 3 this rank's parts of masters and moments."""
        if self._stage < 3:
            return [parameter for parameter in self._engine.module.parameters() if not parameter.requires_grad]
        if self._config.learner.offload_optimizer:  # they are in host memory all the time
            return []
        zero = self._engine.optimizer
        states = (zero.optimizer.state.get(master, {}) for master in zero.fp32_partitioned_groups_flat)
        return [*zero.fp32_partitioned_groups_flat, *(s[moment] for s in states for moment in MOMENTS if moment in s)]

    def close(self) -> None:
        """Leave the process group."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters by the model's own names."""
        policy: Policy = self._engine.module
        return ((name, parameter) for name, parameter in policy.lm.named_parameters() if parameter.requires_grad)

    def _whole(self, parameters: Sequence[nn.Parameter], *, change: bool = False) -> Any:
        """A context in which sharded parameters are whole; with `change`, rank 0's changes reach all ranks."""
        import deepspeed

        modifier = 0 if change else None
        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=modifier, enabled=self._stage == 3)

    def _read(self, parameter: nn.Parameter, part: str) -> Tensor:
        """The parameter's master copy or one of its moments, float32, whole on every rank. Collective."""
        from deepspeed import utils

        if self._stage == 0:
            return parameter if part == MASTER else self._engine.optimizer.state[parameter][part]
        if part == MASTER:
            return torch.as_tensor(utils.safe_get_full_fp32_param(parameter))
        return torch.as_tensor(utils.safe_get_full_optimizer_state(parameter, part))

    @torch.no_grad()
    def _write(self, parameter: nn.Parameter, part: str, value: Tensor) -> None:
        """Set what `_read` returns. Collective.

        The master copy is written twice: into the parameter that the forward pass reads, in its own dtype, and into
        the float32 copy that the optimizer updates, which ZeRO keeps elsewhere, sharded or not by its stage.

        Raises:
            ValueError: the shapes differ.
        """
        from deepspeed import utils

        if part == MASTER:
            with self._whole([parameter], change=True):
                if parameter.shape != value.shape:
                    raise ValueError(f"a parameter has shape {tuple(value.shape)} in place of {tuple(parameter.shape)}")
                parameter.copy_(value)
        if self._stage == 0:
            if part != MASTER:
                self._engine.optimizer.state[parameter][part].copy_(value)
        elif self._stage == 3:
            shard = _shard(value, parameter.ds_tensor.numel())  # type: ignore[attr-defined]
            if part == MASTER:
                utils.safe_set_local_fp32_param(parameter, shard)
            else:
                utils.safe_set_local_optimizer_state(parameter, shard, part)
        elif part == MASTER:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, part)

    def _make_moments(self, steps: int) -> None:
        """Create the optimizer's state after `steps` steps, moments 0; by itself it does so only in its first step."""
        zero = self._engine.optimizer
        optimizer = zero if self._stage == 0 else zero.optimizer
        stage_3 = getattr(zero, "fp32_partitioned_groups_flat", None)
        grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in grouped if stage_3 is None else stage_3:
            state = optimizer.state[parameter]
            if "exp_avg" not in state:
                state |= {moment: torch.zeros_like(parameter.data) for moment in MOMENTS}
            plain = isinstance(optimizer, torch.optim.AdamW)
            # DeepSpeed's FusedAdam counts in a plain int.
            state["step"] = torch.tensor(float(steps), device=parameter.device) if plain else steps
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._lazy_init_hp_params_optimizer_state()

    def _restore_random(self, file: Path, steps: int) -> None:
        """Restore the rank's random state; a rank that the run did not have before is seeded."""
        from safetensors.torch import load_file

        if file.is_file():
            state = load_file(file)
            torch.set_rng_state(state["cpu"])
            if torch.cuda.is_available() and "cuda" in state:
                torch.cuda.set_rng_state(state["cuda"])
        else:
            torch.manual_seed(hash((self._config.run.seed, steps, torch.distributed.get_rank())))


def configured_policy(config: Config, route: Route) -> Policy:
    """Load the initial policy of the run, on the CPU. Raises ModelUnavailable."""
    limit = config.learner.logits_mib * LOGITS_PER_MIB
    return load_policy(config.model.path, config.model.dtype, config.rollout.temperature, limit, route)


def sharded(frozen: Policy, config: Config) -> Any:
    """Shard a frozen policy's parameters over the ranks by ZeRO 3; called like the policy itself. Collective."""
    import deepspeed

    settings = _common(config) | {"zero_optimization": {"stage": 3, "overlap_comm": False}}
    engine, *_ = deepspeed.initialize(model=frozen, config=settings)
    return engine


def _adamw(policy: Policy, config: Config) -> torch.optim.Optimizer:
    """AdamW: DeepSpeed's FusedAdam on a GPU if it can be built, else PyTorch's fused one. Both compute the same."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {
        "lr": config.optimizer.lr,
        "betas": config.optimizer.betas,
        "weight_decay": config.optimizer.weight_decay,
    }
    if torch.cuda.is_available() and not config.learner.offload_optimizer:
        from deepspeed.ops.adam import FusedAdam

        try:
            fused: torch.optim.Optimizer = FusedAdam(parameters, adam_w_mode=True, **settings)
            return fused
        except Exception as error:  # depends on what the compiler lacks
            log.warning("cannot build DeepSpeed's FusedAdam, using PyTorch's AdamW: %s", _brief(error))
    return torch.optim.AdamW(parameters, fused=True, **settings)


def _refusing(optimizer: torch.optim.Optimizer, clip: float) -> torch.optim.Optimizer:
    """Make the optimizer clip, and skip a step whose gradient is not finite, as ZeRO's optimizers do.

    Without ZeRO, DeepSpeed applies any gradient. After a step it reads `_global_grad_norm` and `overflow`.
    """
    apply: Callable[[], object] = optimizer.step
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step() -> None:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer._global_grad_norm = norm  # type: ignore[attr-defined]
        optimizer.overflow = not bool(norm.isfinite())  # type: ignore[attr-defined]
        if not optimizer.overflow:  # type: ignore[attr-defined]
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
            apply()

    optimizer.step = step  # type: ignore[method-assign,assignment]
    return optimizer


def _common(config: Config) -> dict[str, Any]:
    bf16 = config.model.dtype == "bfloat16"
    settings = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": 2**31}
    return settings | {"bf16": {"enabled": bf16}}


def _deepspeed_config(config: Config) -> dict[str, Any]:
    learner = config.learner
    zero: dict[str, Any] = {"stage": learner.zero_stage, "overlap_comm": False}
    if learner.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if learner.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return _common(config) | {
        # Only `step` ends an accumulation: the number of micro-batches differs between updates.
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.grad_clip if learner.zero_stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # PyTorch's fused AdamW runs on the CPU as well, and needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        # A bfloat16 sum of many micro-batches loses small summands.
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def _lots(parts: Sequence[tuple[str, ...]], parameters: Mapping[str, nn.Parameter]) -> Iterator[list[tuple[str, ...]]]:
    """Parts together, as many as have `LOT_BYTES` of parameters or one that has more.

    Example: parts of 100, 100, 300 and 20 MiB make the lots 100 + 100, 300 and 20.
    """
    lot: list[tuple[str, ...]] = []
    filled = 0
    for part in parts:
        size = sum(_whole_bytes(parameters[name]) for name in part if name in parameters)
        if lot and filled + size > LOT_BYTES:
            yield lot
            lot, filled = [], 0
        lot.append(part)
        filled += size
    yield lot


def _whole_bytes(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


def _shard(value: Tensor, size: int) -> Tensor:
    """This rank's part of a flattened tensor, padded with zeros.

    Example: 5 values on 2 ranks with shards of 3: rank 0 gets values 0 1 2, rank 1 gets 3 4 and a zero.
    """
    start = size * torch.distributed.get_rank()
    shard = value.new_zeros(size)
    own = value.flatten()[start : start + size]
    shard[: len(own)] = own
    return shard


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
