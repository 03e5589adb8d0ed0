"""Weight channel of a Ray cluster: shared memory on the publisher's node, the object store between nodes.

A detached actor, the holder, keeps the versions, so that they outlive the learner that published them. It ends with the
cluster or with `close_run`. The first process to use the channel creates it, preferably on its own node; that should be
the learner's, without which nothing is published anyway. If its node dies, Ray restarts it, empty.

On one node a version is written once, by its publisher, into a file in memory (`services.weights.memory`). The holder
has it open, and every reader maps the same memory. To another node it goes in chunks through the object store, once,
and every reader there has its own file.

Invariants
- The holder lists a version only after all of it is in its memory. Once a later owner of the run's name has opened the
  channel, the holder lists nothing of an earlier one: what such a publisher sends arrives in vain.
- Every wait on Ray has a timeout. The holder's methods are idempotent: Ray calls them again after it has restarted the
  holder. A restarted holder is empty until the next publication.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from services.errors import RunTaken, first_line
from services.weights.channel import (
    INITIAL,
    KEPT_VERSIONS,
    Delivery,
    StoringChannel,
    WeightVersion,
    in_memory,
    new_file,
    verify,
)
from services.weights.errors import WeightsCorrupt, WeightsGone, WeightsUnavailable
from services.weights.fence import Fence
from services.weights.memory import Mappings, MemoryFile, MemoryName, Opened, Snapshot
from services.weights.payload import Payload, checksum

NAMESPACE = "anchorage"
CHUNK_BYTES = 64 * 2**20
HELD, MISSING, TAKEN = "held", "missing", "taken"
"""What the holder says about a version that it should keep."""
_SENDING_ATTEMPTS = 3

_T = TypeVar("_T")


@dataclass
class _Kept:
    """A version that the holder keeps.

    Attributes:
        version: which one.
        file: its memory, opened under the shared lock; None for `INITIAL`, which every engine has.
        own: its memory, if the holder made it.
        chunks: references of the chunks that a reader on another node has asked for, by their first byte.
    """

    version: WeightVersion
    file: Opened | None = None
    own: MemoryFile | None = None
    chunks: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    """Where a version is: the node, and its memory there."""

    node: str
    memory: MemoryName


class _Holder:
    """The Ray actor that keeps the versions published last."""

    def __init__(self) -> None:
        self._owner = 0
        self._kept: dict[str, _Kept] = {}
        self._arriving: MemoryFile | None = None
        self._arrived = 0

    def node(self) -> str:
        """Id of this node."""
        return _own_node()

    def own(self, owner: int) -> bool:
        """Begin the run of an owner of the name, by its number. Returns False if there is a later one.

        What earlier owners published is dropped; the same owner may begin again, as after a lost reply.
        """
        if owner > self._owner:
            self._owner = owner
            self.trim(0)
        return owner == self._owner

    def hold_initial(self, owner: int) -> bool:
        """List `INITIAL` as the newest version. Returns False if there is a later owner."""
        if owner < self._owner:
            return False
        self._drop(INITIAL.locator)
        self._kept[INITIAL.locator] = _Kept(INITIAL)
        return True

    def hold(self, owner: int, version: WeightVersion, memory: MemoryName | None) -> str:
        """Keep a version, and drop all but the newest `KEPT_VERSIONS`.

        Args:
            owner: number of the publisher's owner.
            version: which one.
            memory: it is in the memory of a process on this node; None: its chunks have been written here.

        Returns:
            `TAKEN`: there is a later owner. `MISSING`: this process cannot open the memory, or was restarted since the
            first chunk. Else `HELD`.
        """
        if owner < self._owner:
            return TAKEN
        self._owner = owner
        own = None
        if memory is None:
            own, self._arriving = self._arriving, None
            if own is None or self._arrived != version.nbytes:
                return HELD if version.locator in self._kept else MISSING  # asked again
            memory = own.name
        try:
            file = Opened(memory)
        except FileNotFoundError:
            return MISSING
        self._drop(version.locator)
        self._kept[version.locator] = _Kept(version, file, own)
        self.trim(KEPT_VERSIONS)
        return HELD

    def write(self, nbytes: int, offset: int, chunk: Payload) -> bool:
        """Receive a chunk of a version of `nbytes` bytes. Returns whether the ones before it are here."""
        if offset == 0:
            self._arriving, self._arrived = MemoryFile(nbytes), 0
        if self._arriving is None or offset > self._arrived or self._arriving.payload.nbytes != nbytes:
            return False
        self._arriving.payload[offset : offset + chunk.nbytes] = chunk
        self._arrived = offset + chunk.nbytes
        return True

    def trim(self, count: int) -> None:
        """Drop all but the newest `count` versions."""
        for locator in list(self._kept)[: max(0, len(self._kept) - count)]:
            self._drop(locator)

    def latest(self) -> WeightVersion | None:
        """The version published last."""
        return next((kept.version for kept in reversed(self._kept.values())), None)

    def place(self, locator: str) -> _Place | None:
        """Where a version is; None if it is not kept."""
        kept = self._kept.get(locator)
        return None if kept is None or kept.file is None else _Place(_own_node(), kept.file.name)

    def chunk(self, locator: str, start: int, nbytes: int) -> list[Any]:
        """The reference of a chunk in a list, since Ray would resolve a bare one. Empty if it is not kept."""
        import ray

        kept = self._kept.get(locator)
        if kept is None or kept.file is None:
            return []
        if start not in kept.chunks:
            # Stored from here, it is sent to each node once, however many readers ask for it.
            read = os.pread(kept.file.descriptor, nbytes, start)
            kept.chunks[start] = ray.put(np.frombuffer(read, dtype=np.uint8))
        return [kept.chunks[start]]

    def _drop(self, locator: str) -> None:
        kept = self._kept.pop(locator, None)
        if kept is not None and kept.file is not None:
            kept.file.close()


class RayChannel(StoringChannel):
    """Weight channel for processes of one Ray cluster that are connected before the first call.

    Args:
        run: name of the run.
        timeout_s: timeout of every call, in seconds.
        fence: of the publisher; None: nobody else can own the run, and for readers.
    """

    def __init__(self, run: str, timeout_s: float, fence: Fence | None = None) -> None:
        super().__init__(run, timeout_s, fence)
        self._run = run
        self._name = f"weights-{run}"
        self._timeout_s = timeout_s
        self._fence = fence
        self._owner = 0 if fence is None else fence.number
        self._holder: Any = None
        self._mappings = Mappings()

    def open_run(self) -> None:
        """Create the holder, on this node if possible, and begin the owner's run in it."""
        if not self._bounded(lambda left: self._ask("own", left(), self._owner)):
            raise self._taken()

    def announce_initial(self) -> None:
        if self._fence is not None:
            self._fence.check()
        if not self._bounded(lambda left: self._ask("hold_initial", left(), self._owner)):
            raise self._taken()

    def send(self, version: int, snapshot: Snapshot, digest: str | None = None) -> WeightVersion:
        file = in_memory(snapshot)
        found = checksum(file.payload)
        published = WeightVersion(version, file.payload.nbytes, found, f"{version}-{found}")
        if self._fence is not None:
            self._fence.check()
        self._bounded(lambda left: self._give(published, file, left))
        return published

    def _taken(self) -> RunTaken:
        return RunTaken(f"run {self._run} is in use by another process, which has opened its weight channel")

    def make_room(self) -> None:
        self._bounded(lambda left: self._ask("trim", left(), 1))

    def latest(self) -> WeightVersion | None:
        reply: WeightVersion | None = self._bounded(lambda left: self._ask("latest", left()))
        return reply

    def bring(self, wanted: WeightVersion) -> Delivery:
        place = self._place(wanted)
        if place.node == _own_node():
            with contextlib.suppress(FileNotFoundError):  # written over since, or of a user that this one is not
                return self._map(wanted, place.memory)
        file = self._bounded(lambda left: self._pull(wanted, left))
        verify(file.payload, wanted)
        return Delivery(wanted, file.payload, file.name, file)

    def close_run(self) -> None:
        """End the holder, which would outlive the run in a cluster that goes on."""
        import ray

        # Never created, gone already, or gone with the cluster.
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            ray.kill(ray.get_actor(self._name, namespace=NAMESPACE))

    def _give(self, published: WeightVersion, file: MemoryFile, left: Callable[[], float]) -> None:
        """Make the holder keep a version: by its memory, or by its chunks if the holder cannot open that."""

        def held(memory: MemoryName | None) -> bool:
            reply = self._ask("hold", left(), self._owner, published, memory)
            if reply == TAKEN:
                raise self._taken()
            return bool(reply == HELD)

        if self._ask("node", left()) == _own_node() and held(file.name):
            return
        for _ in range(_SENDING_ATTEMPTS):
            if self._give_chunks(file.payload, left) and held(None):
                return
        raise WeightsUnavailable(f"weight channel {self._name} was restarted again and again")

    def _give_chunks(self, payload: Payload, left: Callable[[], float]) -> bool:
        chunks = range(0, payload.nbytes, CHUNK_BYTES)
        return all(
            self._ask("write", left(), payload.nbytes, start, payload[start : start + CHUNK_BYTES]) for start in chunks
        )

    def _place(self, wanted: WeightVersion) -> _Place:
        place: _Place | None = self._bounded(lambda left: self._ask("place", left(), wanted.locator))
        if place is None:
            raise _gone(wanted)
        return place

    def _map(self, wanted: WeightVersion, memory: MemoryName) -> Delivery:
        payload, own = self._mappings.open(memory)
        try:
            verify(payload, wanted)
        except WeightsCorrupt:
            self._place(wanted)  # raises WeightsGone if it was written over before it was locked
            raise
        return Delivery(wanted, payload, own)

    def _pull(self, wanted: WeightVersion, left: Callable[[], float]) -> MemoryFile:
        """Copy a version from another node, chunk by chunk."""
        import ray

        file = new_file(wanted.nbytes)
        for start in range(0, wanted.nbytes, CHUNK_BYTES):
            references = self._ask("chunk", left(), wanted.locator, start, CHUNK_BYTES)
            if not references:
                raise _gone(wanted)
            try:
                chunk: Payload = ray.get(references[0], timeout=left())
            except ray.exceptions.ObjectLostError:
                raise WeightsGone(f"weights of version {wanted.version} were lost with their node") from None
            file.payload[start : start + chunk.nbytes] = chunk
        return file

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


def _own_node() -> str:
    import ray

    node: str = ray.get_runtime_context().get_node_id()
    return node


def _gone(wanted: WeightVersion) -> WeightsGone:
    return WeightsGone(f"weights of version {wanted.version} are no longer kept")
