"""Host memory and disk of a run, as if all of it were on one machine."""

from __future__ import annotations

from dataclasses import dataclass

from anchorage.planning.assumptions import Assumptions
from anchorage.planning.shapes import Shape
from anchorage.planning.states import States, number_bytes, trained_parameters
from services.config.tree import Config

GIB = 2**30
OBJECT_STORE_BYTES = 256 * 2**20
"""Ray's store in a cluster of the run's own (`anchorage/runs/stack.py`); weights do not go through it on one node."""
PUBLISHED_COPIES = 2
"""Versions of the weights that are in memory while one is published: the newest, and the one being written."""
BYTES_IN_CHECKPOINT = 12
"""Of a trained parameter: float32, and two moments."""


@dataclass(frozen=True, slots=True)
class Host:
    """Bytes.

    Attributes:
        processes: of the run, actors, engines, ranks and environment servers, without data.
        learner: off-loaded states, or everything of the ranks on CPUs; also the states of ranks that take turns with an
            engine on a GPU, while it has the GPU.
        engines: weights and caches on CPUs; 0 on GPUs.
        weights: versions on their way to the actors; with adapters also the base weights that each actor adds them to.
        loading: the model, once for each rank while it is loaded.
        buffer: most trajectories in Redis, and Ray's object store.
        disk: checkpoints that are kept with the one being written, the best policy, and kept groups.
    """

    processes: int
    learner: int
    engines: int
    weights: int
    loading: int
    buffer: int
    disk: int

    @property
    def total(self) -> int:
        """Bytes of memory at the largest moment; the model is loaded before weights and trajectories exist."""
        return self.processes + self.learner + self.engines + max(self.loading, self.weights + self.buffer)


def host_of(
    shape: Shape, config: Config, assumed: Assumptions, states: States, *, on_cpu: tuple[int, int] | None
) -> Host:
    """Compute host memory and disk; `on_cpu`: bytes of one rank and of one engine where nothing is on a GPU."""
    ranks, engines = config.learner.ranks, config.rollout.actors * config.rollout.tensor_parallel
    library = assumed.gpu_process_gib if on_cpu is None else assumed.cpu_process_gib
    servers = sum(not env.addresses for env in config.environments)
    processes = (1 + config.rollout.actors) * assumed.process_gib + (ranks + engines) * library
    processes += servers * assumed.environment_gib
    away = states.movable if config.rollout.share_gpus == "turns" else 0
    rank, engine = (states.host + away, 0) if on_cpu is None else on_cpu
    trained = trained_parameters(shape, config)
    whole, adapted = number_bytes(config) * shape.parameters, config.model.lora is not None
    sent = number_bytes(config) * trained if adapted else whole
    return Host(
        processes=int(processes * GIB),
        learner=ranks * rank,
        engines=engines * engine,
        weights=PUBLISHED_COPIES * sent + (config.rollout.actors * whole if adapted else 0),
        loading=ranks * states.loading,
        buffer=(config.buffer.max_mib * 2**20 if config.buffer.redis_url is None else 0) + OBJECT_STORE_BYTES,
        disk=disk_of(shape, config),
    )


def disk_of(shape: Shape, config: Config) -> int:
    """Bytes of the run's folder: checkpoints, the best policy, groups for the dashboard."""
    trained = trained_parameters(shape, config) if config.model.lora is not None else shape.parameters
    policy = number_bytes(config) * shape.parameters
    each = BYTES_IN_CHECKPOINT * trained + policy
    best = policy if config.checkpoint.keep_best and config.evaluation.every is not None else 0
    return each * (config.checkpoint.keep + 1) + best + config.telemetry.keep_groups_mib * 2**20
