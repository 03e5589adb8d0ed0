"""Weight channel through Ray's object store: one copy per node, pulled peer to peer, read without copying.

A detached actor, the holder, owns the payloads, so that they outlive the learner that published them. It ends with the
cluster or with `close_run`. The first process to use the channel creates it, preferably on its own node; that should be
the learner, without which nothing is published anyway. If its node dies, Ray restarts it, empty.

Invariants
- The holder lists a version only after its payload is in the object store.
- Every wait on Ray has a timeout. The holder's methods are idempotent: Ray calls them again after it has restarted the
  holder. A restarted holder is empty until the next publication.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from services.errors import first_line
from services.weights.channel import (
    KEPT_VERSIONS,
    Payload,
    WeightChannel,
    WeightsGone,
    WeightsUnavailable,
    WeightVersion,
    checksum,
    pack,
    unpack,
    verify,
)

if TYPE_CHECKING:
    import torch

NAMESPACE = "anchorage"

_T = TypeVar("_T")


class _Holder:
    """The Ray actor that owns the payloads of the versions published last."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[WeightVersion, Any]] = {}

    def hold(self, version: WeightVersion, payload: Payload) -> None:
        """Keep a version, and drop all but the newest `KEPT_VERSIONS`."""
        import ray

        # Stored from here, the payload is owned by this actor and survives its publisher.
        reference = ray.put(payload)
        self._kept.pop(version.locator, None)
        self._kept[version.locator] = (version, reference)
        while len(self._kept) > KEPT_VERSIONS:
            del self._kept[next(iter(self._kept))]

    def latest(self) -> WeightVersion | None:
        """The version published last."""
        return next((version for version, _ in reversed(self._kept.values())), None)

    def reference(self, locator: str) -> list[Any]:
        """The payload's reference in a list, since Ray would resolve a bare one. Empty if it is not kept."""
        return [self._kept[locator][1]] if locator in self._kept else []


class RayChannel(WeightChannel):
    """Weight channel for processes of one Ray cluster that are connected before the first call."""

    def __init__(self, run: str, timeout_s: float) -> None:
        self._name = f"weights-{run}"
        self._timeout_s = timeout_s
        self._holder: Any = None

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> WeightVersion:
        payload = pack(tensors)
        digest = checksum(payload)
        published = WeightVersion(version, payload.nbytes, digest, f"{version}-{digest}")
        self._bounded(lambda left: self._ask("hold", left(), published, payload))
        return published

    def latest(self) -> WeightVersion | None:
        reply: WeightVersion | None = self._bounded(lambda left: self._ask("latest", left()))
        return reply

    def fetch(self, wanted: WeightVersion) -> dict[str, torch.Tensor]:
        payload = self._bounded(lambda left: self._pull(wanted, left))
        verify(payload, wanted)
        return unpack(payload)

    def close_run(self) -> None:
        """End the holder, which would outlive the run in a cluster that goes on."""
        import ray

        # Never created, gone already, or gone with the cluster.
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            ray.kill(ray.get_actor(self._name, namespace=NAMESPACE))

    def _pull(self, wanted: WeightVersion, left: Callable[[], float]) -> Payload:
        import ray

        references = self._ask("reference", left(), wanted.locator)
        if not references:
            raise WeightsGone(f"weights of version {wanted.version} are no longer kept")
        try:
            payload: Payload = ray.get(references[0], timeout=left())
        except ray.exceptions.ObjectLostError:
            raise WeightsGone(f"weights of version {wanted.version} were lost with their node") from None
        return payload

    def _ask(self, method: str, timeout_s: float, *args: object) -> Any:
        import ray

        if self._holder is None:
            self._holder = self._find_holder()
        try:
            return ray.get(getattr(self._holder, method).remote(*args), timeout=timeout_s)
        except ray.exceptions.ActorDiedError:
            self._holder = None  # ended permanently: the next call creates another
            raise

    def _find_holder(self) -> Any:
        """The run's holder, created if there is none."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        holder = ray.remote(_Holder).options(
            scheduling_strategy=here,
            name=self._name,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
        )
        return holder.remote()

    def _bounded(self, operation: Callable[[Callable[[], float]], _T]) -> _T:
        """Run `operation` with a function that returns the seconds left. Errors of Ray become WeightsUnavailable."""
        import ray

        deadline = time.monotonic() + self._timeout_s
        try:
            return operation(lambda: max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            raise WeightsUnavailable(
                f"weight channel {self._name} did not respond within weights.timeout_s ({self._timeout_s:.0f} s)"
            ) from None
        except ray.exceptions.RayError as error:
            reason = f"{type(error).__name__} {first_line(error)}"
            raise WeightsUnavailable(f"weight channel {self._name} failed: {reason}") from error
