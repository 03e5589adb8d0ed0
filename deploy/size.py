"""Print the memory that a run's containers need, by its recipe and its model's size: for `.env`, or for the chart.

    python -m deploy.size configs/alfworld.yaml model.path=/models/Qwen2.5-1.5B-Instruct >> .env
    python -m deploy.size configs/alfworld.yaml model.path=/models/Qwen2.5-1.5B-Instruct --helm > sizes.yaml

It needs the base installation only (`make setup-env`), and of the model `config.json`. What is on the cards is not
counted here (`anchorage plan`): only memory of the hosts, /dev/shm and disk. The figures are arithmetic with `ROOM`.

Example: 3 GiB of weights (1.5 B parameters in bfloat16), one rank and one place a container, all parameters trained.

    object store  2 × 3 + 0.5                      7 GiB     actor    8.5 + (3.8 + 2 × 3) × 1.3   22 GiB
    /dev/shm      6.5 + 2                          9 GiB     learner  8.5 + (3 + 3 × 3) × 1.3     25 GiB
                                                             trainer  8.5 + (0.8 + 2 × 3) × 1.3   18 GiB
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anchorage.planning.assumptions import Assumptions
from anchorage.planning.host import disk_of
from anchorage.planning.plan import GIB
from anchorage.planning.shapes import Shape, shape_of
from anchorage.planning.states import number_bytes, states_of, trained_parameters
from env_servers.arguments import positive
from services.config.load import ConfigError, load_config
from services.config.tree import Config
from services.errors import ModelUnavailable
from services.weights.channel import KEPT_VERSIONS

ROOM = 1.3
"""What a container may take for each byte of processes and weights that is counted."""
SHM_GIB = 2.0
"""Of /dev/shm beside the object store: NCCL's and vLLM's own segments."""
STORE_GIB = 0.5
"""Of the object store for everything but weights: rows of an update, results of calls."""
RUN_GIB = 10.0
"""Of the runs' volume for metrics and logs."""


@dataclass(frozen=True)
class Sizes:
    """Memory in GiB, rounded up. `store`, `shm`: Ray's object store, /dev/shm. `runs`: the volume of the runs."""

    store: int
    shm: int
    actor: int
    learner: int
    trainer: int
    runs: int


def sizes(shape: Shape, config: Config, places: int = 1, ranks: int | None = None) -> Sizes:
    """Compute what containers need.

    Args:
        shape: of the model.
        config: of the run.
        places: rollout places of one actor container.
        ranks: learner ranks of one container; None: all.
    """
    states, assumed = states_of(shape, config), Assumptions()
    weights = number_bytes(config) * shape.parameters / GIB
    travels = number_bytes(config) * trained_parameters(shape, config) / GIB
    # Each container is a Ray node: versions go between them in chunks, which stay in the store of the holder's node as
    # long as their version is kept. Within a container they take nothing of it.
    store = KEPT_VERSIONS * travels + STORE_GIB
    shm = store + SHM_GIB
    # An engine loads the model through host memory, and holds the newest version beside it while it passes.
    place = assumed.process_gib + config.rollout.tensor_parallel * assumed.gpu_process_gib + weights + travels
    rank = assumed.gpu_process_gib + (states.loading + states.host) / GIB
    actor = shm + ROOM * places * place
    # Shared memory of the version that is announced and of the one that is written: rank 0's, and the holder's.
    versions = KEPT_VERSIONS * travels
    learner = shm + ROOM * ((config.learner.ranks if ranks is None else ranks) * rank + versions)
    trainer = shm + ROOM * (assumed.process_gib + versions)
    runs = disk_of(shape, config) / GIB + RUN_GIB
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
    parser.add_argument("--places", type=positive, default=1, help="rollout places of an actor container (default 1)")
    parser.add_argument("--ranks", type=positive, help="learner ranks of a container (default: learner.ranks)")
    parser.add_argument("--helm", action="store_true", help="print values of the chart instead of lines for .env")
    given = parser.parse_args(arguments)
    try:
        config = load_config(given.recipe, given.overrides)
        shape = shape_of(config.model.path)
    except (ConfigError, ModelUnavailable) as error:
        print(f"size: {error}", file=sys.stderr)
        return 2
    found = sizes(shape, config, given.places, given.ranks)
    print(f"# {shape.parameters / 1e9:.2f} B parameters, {config.model.dtype} ({given.recipe})")
    print(as_values(found) if given.helm else as_env(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
