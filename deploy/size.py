"""Print the memory that a run's containers need, by its recipe and its model's size: for `.env`, or for the chart.

    python -m deploy.size configs/alfworld.yaml model.path=/models/Qwen2.5-1.5B-Instruct >> .env
    python -m deploy.size configs/alfworld.yaml model.path=/models/Qwen2.5-1.5B-Instruct --helm > sizes.yaml

It needs the base installation only (`make setup-env`), and reads nothing of the model but the headers of its weights.
What is on the cards is not counted here: only memory of the host, /dev/shm and disk. The figures are bounds by
arithmetic, with room; nothing was measured on GPUs.

Example: 3 GiB of weights (1.5 B parameters in bfloat16), one rank and one place a container, all parameters trained.

    object store  5 × 3 + 0.5        16 GiB     actor    17.5 + 8 + 2 × 3    32 GiB
    /dev/shm      15.5 + 2           18 GiB     learner  17.5 + 8 + 2 × 3    32 GiB
                                                trainer  17.5 + 4 + 2 × 3    28 GiB
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.config.load import ConfigError, load_config
from services.config.tree import Config
from services.errors import ModelUnavailable
from services.model_folder import stored_parameters
from services.weights.channel import KEPT_VERSIONS

GIB = 2**30
PROCESS_GIB = 8.0
"""Host memory of a process on a GPU without weights: PyTorch, CUDA's context, pinned buffers, NCCL."""
TRAINER_GIB = 4.0
SHM_GIB = 2.0
"""Of /dev/shm beside the object store: NCCL's and vLLM's own segments."""
STORE_GIB = 0.5
"""Of the object store for everything but weights: rows of an update, results of calls."""
IN_FLIGHT = 3
"""Copies of a new version in one object store while it is published: the rank's result, the argument of the call that
hands it over, and the one being read."""
LORA_GIB = 0.5
OPTIMIZER_BYTES, GRADIENT_BYTES = 12, 4
"""A parameter: the float32 copy and two moments; the gradient."""
RUN_GIB = 10.0
"""Of the runs' volume for metrics, logs and kept groups."""


@dataclass(frozen=True)
class Sizes:
    """Memory in GiB, rounded up. `store`, `shm`: Ray's object store, /dev/shm. `runs`: the volume of the runs."""

    store: int
    shm: int
    actor: int
    learner: int
    trainer: int
    runs: int


def sizes(config: Config, parameters: int, places: int = 1, ranks: int | None = None) -> Sizes:
    """Compute what containers need.

    Args:
        config: of the run.
        parameters: number of the model's.
        places: rollout places of one actor container.
        ranks: learner ranks of one container; None: all.
    """
    ranks = config.learner.ranks if ranks is None else ranks
    weights = parameters * (2 if config.model.dtype == "bfloat16" else 4) / GIB
    lora = config.model.lora is not None
    travels = LORA_GIB if lora else weights
    trained = 0 if lora else parameters / GIB
    store = (KEPT_VERSIONS + IN_FLIGHT) * travels + STORE_GIB
    shm = store + SHM_GIB
    # Each loads the model into host memory first, and holds the newest version beside it while it passes.
    actor = shm + places * (PROCESS_GIB + weights + travels)
    learner = shm + ranks * (PROCESS_GIB + weights) + travels
    if config.learner.offload_optimizer:
        learner += (OPTIMIZER_BYTES + GRADIENT_BYTES) * trained * ranks / config.learner.ranks
    if config.learner.offload_parameters:
        learner += weights
    if config.learner.reference == "offloaded":
        learner += ranks * weights
    trainer = shm + 2 * travels + TRAINER_GIB
    checkpoint = OPTIMIZER_BYTES * trained + weights
    runs = (config.checkpoint.keep + 1) * checkpoint + config.checkpoint.keep_best * weights + RUN_GIB
    return Sizes(*(math.ceil(value) for value in (store, shm, actor, learner, trainer, runs)))


def as_env(found: Sizes) -> str:
    """Return lines of a `.env` file for docker-compose.yml."""
    return (
        f"ANCHORAGE_OBJECT_STORE_BYTES={found.store * GIB}\n"
        f"ANCHORAGE_SHM={found.shm}g\n"
        f"ANCHORAGE_ACTOR_MEMORY={found.actor}g\n"
        f"ANCHORAGE_LEARNER_MEMORY={found.learner}g\n"
        f"ANCHORAGE_TRAINER_MEMORY={found.trainer}g\n"
        f"# The volume `runs` needs {found.runs} GiB of disk.\n"
    )


def as_values(found: Sizes) -> str:
    """Return values of the chart, as YAML."""
    groups = "".join(
        f"{name}: {{resources: {{requests: {{memory: {size}Gi}}, limits: {{memory: {size}Gi}}}}}}\n"
        for name, size in (("rollout", found.actor), ("learner", found.learner), ("trainer", found.trainer))
    )
    nodes = f"nodes: {{objectStoreBytes: {found.store * GIB}, shm: {found.shm}Gi}}\n"
    return f"runs: {{size: {found.runs}Gi}}\n{nodes}{groups}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Memory of a run's containers, for .env or the chart.")
    parser.add_argument("recipe", type=Path, help="the run's recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for `anchorage train`")
    parser.add_argument("--places", type=int, default=1, help="rollout places of an actor container (default 1)")
    parser.add_argument("--ranks", type=int, help="learner ranks of a container (default: learner.ranks)")
    parser.add_argument("--helm", action="store_true", help="print values of the chart instead of lines for .env")
    given = parser.parse_args(arguments)
    try:
        config = load_config(given.recipe, given.overrides)
        parameters = stored_parameters(config.model.path)
    except (ConfigError, ModelUnavailable) as error:
        print(f"size: {error}", file=sys.stderr)
        return 2
    if not parameters:
        print(f"size: no *.safetensors in {config.model.path}: set model.path to the model's folder", file=sys.stderr)
        return 2
    found = sizes(config, parameters, given.places, given.ranks)
    print(f"# {parameters / 1e9:.2f} B parameters, {config.model.dtype} ({given.recipe})")
    print(as_values(found) if given.helm else as_env(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
