"""All ranks of the learner, as one thing that works or has failed. The only file of the learner that knows Ray.

Invariants
- A call goes to every rank and comes back when all have answered, or as soon as one has failed: no rank is waited for
  whose peer is dead.
- A failed group is unusable until `restart`, which starts every rank in a new process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from learner.batching import Row, Sharing, plan
from learner.prepare import OptimizerStep
from learner.rank.parity import Parity
from learner.rank.rank import Rank
from services.config.tree import Config
from services.errors import AnchorageError, RunStalled, UpdateNotFinite

PLACEMENT_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 3600.0
"""No update, load or save takes as long; a rank that does is taken for dead."""

log = logging.getLogger(__name__)


class RankFailed(Exception):
    """A rank died, or raised something it cannot go on from. The message is one line."""


class RankGroup:
    """The learner's ranks as Ray actors, one `learner` resource each. Ray must be initialised."""

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
            RunStalled: the cluster has no room for the ranks, or GPUs for some of them only.
            ModelUnavailable: the model cannot be loaded, or the learner would not train what it computes.
            RankFailed: a rank died.
        """
        import ray

        ranks = self._config.learner.ranks
        there = ray.cluster_resources().get("GPU", 0)
        if 0 < there < ranks:
            raise RunStalled(f"learner.ranks={ranks}: each takes a GPU, and the Ray cluster has {there:g}")
        gpus = 1 if there else 0
        # Kept over a restart: a rollout actor that waits for a GPU would take it in between.
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
        """How rows go through the model, and what was measured of that; once started."""
        assert self._parity is not None
        return self._parity

    @property
    def sharing(self) -> Sharing:
        """What the rows of an update may share, see `learner.batching.plan`."""
        return self.parity.route.sharing

    def update(self, work: Sequence[Sequence[OptimizerStep]]) -> dict[str, float]:
        """One policy update; `work[r]` is rank r's.

        Answers the loss metrics, averaged over all tokens trained on, and the largest of some of them as `NAME_max`.
        `fresh_gap` is the mean |log π − log μ| over the tokens that this very version sampled; missing without such.

        Raises:
            UpdateNotFinite: an advantage, a log-probability, the loss or the gradient is not finite; nothing has
                changed.
            RankFailed: a rank died, or a later optimizer step of the update was not finite.
        """
        _require_finite(work)
        answers = _gather([a.update.remote(w) for a, w in zip(self._actors, work, strict=True)])
        sums = {k[4:]: sum(a[k] for a in answers) for k in answers[0] if k.startswith("sum/")}
        tokens = max(sums.pop("tokens"), 1.0)
        loss = sums.pop("loss")
        maxima = {k[4:]: max(a[k] for a in answers) for k in answers[0] if k.startswith("max/")}
        figures = {name: value for name, value in answers[0].items() if not name.startswith(("sum/", "max/"))}
        figures |= {f"{name}_max": value for name, value in maxima.items()}
        fresh = sums.pop("fresh_gap", 0.0), sums.get("fresh_fraction", 0.0)
        figures |= {"fresh_gap": fresh[0] / fresh[1]} if fresh[1] > 0 else {}
        return figures | {name: value / tokens for name, value in sums.items()} | {"loss": loss}

    def finite(self, work: Sequence[Sequence[OptimizerStep]]) -> bool:
        """Whether the policy gives finite log-probabilities to these rows; `work[r]` is rank r's. Changes nothing."""
        return all(_gather([a.finite.remote(w) for a, w in zip(self._actors, work, strict=True)]))

    def gap(self, rows: Sequence[Row]) -> tuple[float, float]:
        """Largest and mean difference (nats) between the rows' log-probabilities and the learner's."""
        learner = self._config.learner
        work = plan(rows, learner.ranks, learner.microbatch_tokens, self.sharing)
        answers = _gather([a.gap.remote(w) for a, w in zip(self._actors, work, strict=True)])
        largest, totals, counts = zip(*answers, strict=True)
        return max(largest), sum(totals) / max(1, sum(counts))

    def weights(self) -> dict[str, Tensor]:
        """The whole model under its Hugging Face names, on the CPU."""
        weights: dict[str, Tensor] = self._call("weights")[0]
        return weights

    def save(self, folder: Path) -> None:
        """Every rank writes its part into `folder`, which all of them must be able to reach."""
        self._call("save", folder.resolve())

    def load(self, folder: Path) -> None:
        self._call("load", folder.resolve())

    def restart(self) -> None:
        """Replace every rank by a new process that has the initial model loaded."""
        self._kill()
        self.start()

    def stop(self) -> None:
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
        return _gather([getattr(actor, method).remote(*args) for actor in self._actors])


def start_ranks(config: Config) -> RankGroup:
    """Start the learner's ranks; see `RankGroup.start`."""
    group = RankGroup(config)
    try:
        group.start()
    except BaseException:
        group.stop()
        raise
    return group


def _place(ranks: int, gpus: int) -> Any:
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
    # PASSIVE: threads that wait must not spin, the actors need the cores.
    own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return own if gpus else own | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def _require_finite(work: Sequence[Sequence[OptimizerStep]]) -> None:
    batches = (batch for own in work for step in own for batch in step.batches)
    for batch in batches:
        for name, values in (("an advantage", batch.advantage), ("a sampler's log-probability", batch.behaviour)):
            if not np.isfinite(values).all():
                raise UpdateNotFinite(f"{name} of the update is not finite")


def _gather(references: list[Any]) -> list[Any]:
    import ray

    deadline = time.monotonic() + CALL_TIMEOUT_S
    pending = list(references)
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise RankFailed(f"a learner rank did not answer for {CALL_TIMEOUT_S:.0f} s")
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, AnchorageError):
                raise error.cause from None
            log.exception("a learner rank failed")
            raise RankFailed(f"a learner rank failed: {_brief(error.cause)}") from None
        except ray.exceptions.RayError as error:
            raise RankFailed(f"a learner rank died: {_brief(error)}") from None
    return list(ray.get(references))


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
