"""All ranks of the learner as one unit, which works or has failed. The only file of the learner that depends on Ray.

Invariants
- A call goes to every rank and returns when all have returned, or as soon as one has failed: nothing waits for a rank
  whose peer has died.
- A failed group is unusable until `restart`, which starts every rank in a new process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from learner.batching import Row, Sharing, plan
from learner.prepare import OptimizerStep
from learner.rank.parity import Parity
from learner.rank.rank import Rank
from services.config.tree import Config
from services.errors import AnchorageError, RunStalled, UpdateNotFinite, first_line
from services.weights import WeightChannel

PLACEMENT_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 3600.0
"""Longer than any update, load or save; a rank that takes longer counts as dead."""
PUBLISHED_WAIT_S = 0.05
MEANWHILE_S = 0.1

log = logging.getLogger(__name__)


class RankFailed(Exception):
    """A rank died, or raised an error that leaves it unusable. The message is one line."""


class RankGroup:
    """The learner's ranks as Ray actors, with one `learner` resource each. Ray must be initialised.

    Attributes:
        checkpoint_bytes: approximate size of what `save` and `export` write.
        pids: process ids of the ranks.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._actors: list[Any] = []
        self._placement: Any = None
        self.checkpoint_bytes = 0
        self._parity: Parity | None = None
        self.pids: tuple[int, ...] = ()

    def start(self) -> None:
        """Start every rank and load the model.

        Raises:
            RunStalled: the cluster lacks room for the ranks, or has GPUs for only some of them.
            ModelUnavailable: the model cannot be loaded, or the learner would train another function than it computes.
            RankFailed: a rank died.
        """
        import ray

        ranks = self._config.learner.ranks
        there = ray.cluster_resources().get("GPU", 0)
        if 0 < there < ranks:
            raise RunStalled(f"learner.ranks={ranks}: each needs a GPU, and the Ray cluster has {there:g}")
        gpus = 1 if there else 0
        # Kept across restarts: a rollout actor that waits for a GPU would take it in between.
        self._placement = self._placement or _place(ranks, gpus)
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._placement)
        actor = ray.remote(Rank).options(
            num_cpus=0,
            num_gpus=gpus,
            resources={"learner": 1},
            scheduling_strategy=strategy,
            max_restarts=0,
            runtime_env={"env_vars": _environment(self._config.learner.threads, gpus)},
        )
        self._actors = [actor.remote(self._config, number) for number in range(ranks)]
        addresses = self._call("address")
        self.pids = tuple(pid for _, _, pid in addresses)
        host, port, _ = addresses[0]
        self.checkpoint_bytes = self._call("connect", host, port)[0]
        self._parity = self._call("parity")[0]

    @property
    def parity(self) -> Parity:
        """What was measured of the model, and the route that rows take. Only after `start`."""
        assert self._parity is not None
        return self._parity

    @property
    def sharing(self) -> Sharing:
        """What rows of an update may share, see `learner.batching.plan`. Only after `start`."""
        return self.parity.route.sharing

    def update(
        self, work: Sequence[Sequence[OptimizerStep]], meanwhile: Callable[[], None] | None = None
    ) -> dict[str, float]:
        """Do one policy update.

        Args:
            work: optimizer steps of each rank.
            meanwhile: called several times a second until it is done.

        Returns:
            Loss metrics, averaged over all tokens, and the largest value of some as `NAME_max`. `fresh_gap` is the
            mean |log π − log μ| in nats over the tokens that the updated version itself sampled; absent without such.

        Raises:
            UpdateNotFinite: an advantage, a log-probability, the loss or the gradient is not finite; nothing has
                changed.
            RankFailed: a rank died, or a later optimizer step of the update was not finite.
        """
        _require_finite(work)
        results = _gather([a.update.remote(w) for a, w in zip(self._actors, work, strict=True)], meanwhile)
        sums = {k[4:]: sum(a[k] for a in results) for k in results[0] if k.startswith("sum/")}
        tokens = max(sums.pop("tokens"), 1.0)
        loss = sums.pop("loss")
        maxima = {k[4:]: max(a[k] for a in results) for k in results[0] if k.startswith("max/")}
        figures = {name: value for name, value in results[0].items() if not name.startswith(("sum/", "max/"))}
        figures |= {f"{name}_max": value for name, value in maxima.items()}
        fresh = sums.pop("fresh_gap", 0.0), sums.get("fresh_fraction", 0.0)
        figures |= {"fresh_gap": fresh[0] / fresh[1]} if fresh[1] > 0 else {}
        return figures | {name: value / tokens for name, value in sums.items()} | {"loss": loss}

    def finite(self, work: Sequence[Sequence[OptimizerStep]]) -> bool:
        """Whether the policy's log-probabilities of these rows are finite; `work` as for `update`. Changes nothing."""
        return all(_gather([a.finite.remote(w) for a, w in zip(self._actors, work, strict=True)]))

    def gap(self, rows: Sequence[Row]) -> tuple[float, float]:
        """Largest and mean absolute difference between the rows' log-probabilities and the learner's, in nats."""
        learner = self._config.learner
        work = plan(rows, learner.ranks, learner.microbatch_tokens, self.sharing)
        results = _gather([a.gap.remote(w) for a, w in zip(self._actors, work, strict=True)])
        largest, totals, counts = zip(*results, strict=True)
        return max(largest), sum(totals) / max(1, sum(counts))

    def publish(self, version: int, channel: WeightChannel) -> None:
        """Begin to publish the weights as `version`: returns once they may change again. Rank 0 sends them.

        Raises:
            WeightsUnavailable: there is no room for them, or those before could not be published.
            RunTaken: those before were not announced because another process owns the run.
        """
        self._call("publish", version, channel)

    def published(self) -> bool:
        """Whether the last version is announced; waits a moment for it. Raises as `publish` if it cannot be."""
        announced: bool = _gather([self._actors[0].published.remote(PUBLISHED_WAIT_S)])[0]
        return announced

    def rest(self) -> None:
        """Say that nothing is asked of the ranks until the actors have played; see `learner.card_turns`."""

    def save(self, folder: Path) -> None:
        """Write the engine's checkpoint into a folder that all ranks can reach. Raises CheckpointFailed."""
        self._call("save", folder.resolve())

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder that this process can reach. Raises CheckpointFailed."""
        self._call("export", folder.resolve())

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote. Raises CheckpointFailed."""
        self._call("load", folder.resolve())

    def restart(self) -> None:
        """Replace every rank by a new process with the initial model. Raises as `start`."""
        self._kill()
        self.start()

    def stop(self) -> None:
        """End all ranks and release their resources."""
        import ray

        self._kill()
        if self._placement is not None:
            ray.util.remove_placement_group(self._placement)
            self._placement = None

    def _kill(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _call(self, method: str, *args: object) -> list[Any]:
        """Call a method of every rank; return the results by rank. Raises RankFailed, or what a rank raised."""
        return _gather([getattr(actor, method).remote(*args) for actor in self._actors])


def start_ranks(config: Config) -> RankGroup:
    """Start the learner's ranks; see `RankGroup.start`."""
    return started(RankGroup(config))


def started(group: RankGroup) -> RankGroup:
    """The group, once its ranks have started; whatever interrupts that leaves none behind. Raises as its `start`."""
    try:
        group.start()
    except BaseException:
        group.stop()
        raise
    return group


def _place(ranks: int, gpus: int) -> Any:
    """Reserve the ranks' resources. Raises RunStalled if the cluster lacks them for `PLACEMENT_TIMEOUT_S`."""
    import ray

    bundle = {"learner": 1.0} | ({"GPU": 1.0} if gpus else {})
    placement = ray.util.placement_group([bundle] * ranks, strategy="PACK")
    try:
        ray.get(placement.ready(), timeout=PLACEMENT_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        ray.util.remove_placement_group(placement)
        there = ray.cluster_resources()
        taken = f" and {there['GPU']:g} GPU(s), some held by rollout actors (see rollout.share_gpus)" if gpus else ""
        raise RunStalled(
            f"the Ray cluster has no room for {ranks} learner rank(s): "
            f"its nodes offer {there.get('learner', 0):g} 'learner' resource(s){taken}"
        ) from None
    return placement


def _environment(threads: int, gpus: int) -> dict[str, str]:
    # PASSIVE: waiting threads must not spin, because the actors need the cores.
    own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return own if gpus else own | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def _require_finite(work: Sequence[Sequence[OptimizerStep]]) -> None:
    """Raise UpdateNotFinite if an advantage or a sampler's log-probability is not finite."""
    batches = (batch for own in work for step in own for batch in step.batches)
    for batch in batches:
        for name, values in (("an advantage", batch.advantage), ("a sampler's log-probability", batch.behaviour)):
            if not np.isfinite(values).all():
                raise UpdateNotFinite(f"{name} of the update is not finite")


def _gather(references: list[Any], meanwhile: Callable[[], None] | None = None) -> list[Any]:
    """Results of the ranks' calls, in order. Raises the first failure, without waiting for the other ranks."""
    import ray

    deadline = time.monotonic() + CALL_TIMEOUT_S
    pending, results = list(references), {}
    while pending:
        left = max(0.0, deadline - time.monotonic())
        done, pending = ray.wait(pending, num_returns=1, timeout=left if meanwhile is None else min(left, MEANWHILE_S))
        if meanwhile is not None:
            meanwhile()
        if not done and time.monotonic() < deadline:
            continue
        if not done:
            raise RankFailed(f"a learner rank did not return within {CALL_TIMEOUT_S:.0f} s")
        try:
            results[done[0]] = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, AnchorageError):
                raise error.cause from None
            log.exception("a learner rank failed")
            kind = type(error.cause).__name__
            raise RankFailed(f"a learner rank failed: {kind}: {first_line(error.cause)}") from None
        except ray.exceptions.RayError as error:
            raise RankFailed(f"a learner rank died: {first_line(error)}") from None
    return [results[reference] for reference in references]
