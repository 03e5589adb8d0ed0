"""Interface of weight channels.

Invariants
- A version is announced (`latest`) only once its whole payload is available. Readers verify the checksum.
- A run that has lost its name announces nothing any more (`services.weights.fence`).
- The newest version is the one published last, whatever its number: a learner that restarts from a checkpoint publishes
  older numbers again. A channel keeps the last two; the older one goes early if its memory is needed for the next.
- Every call ends within the channel's timeout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from services.weights.adapter import is_adapter
from services.weights.errors import WeightsCorrupt, WeightsUnavailable
from services.weights.memory import MemoryFile, MemoryName, MemoryPool, Snapshot, SnapshotPool
from services.weights.payload import Layout, Payload, checksum, fill, names_in, unpack

if TYPE_CHECKING:
    import torch

KEPT_VERSIONS = 2


@dataclass(frozen=True)
class WeightVersion:
    """An announced version.

    Attributes:
        version: policy version, the number of updates.
        nbytes: size of the payload.
        checksum: of the payload, hexadecimal.
        locator: where the channel keeps it.
    """

    version: int
    nbytes: int
    checksum: str
    locator: str

    @property
    def initial(self) -> bool:
        """Whether it is the weights of `model.path`, with which every engine starts."""
        return self == INITIAL


INITIAL = WeightVersion(0, 0, "", "model.path")


@dataclass(frozen=True)
class Delivery:
    """A verified version in the memory of this node. It does not change while this object, or a view of it, is alive.

    Attributes:
        version: which one.
        payload: its bytes; do not write.
        memory: for other processes of the node, such as an engine's, while this object is alive.
        file: what holds the memory, if it is this process's own.
    """

    version: WeightVersion
    payload: Payload = field(repr=False)
    memory: MemoryName
    file: MemoryFile | None = field(default=None, repr=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name: views of the payload. Raises WeightsCorrupt."""
        return unpack(self.payload)

    def adapters(self) -> bool:
        """Whether its tensors are adapters, not a whole model. Raises WeightsCorrupt."""
        return is_adapter(names_in(self.payload))


class WeightChannel(ABC):
    """One publisher, any number of readers, early or late.

    It may be sent to other processes: what is sent are the arguments of its construction.

    Args:
        arguments: of the construction.
    """

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __reduce__(self) -> tuple[type[WeightChannel], tuple[Any, ...]]:
        return type(self), self._arguments

    def same(self, other: WeightChannel) -> bool:
        """Whether both lead to the same versions."""
        return self.__reduce__() == other.__reduce__()

    def open_run(self) -> None:  # noqa: B027 - most channels have nothing to prepare
        """Begin a run: forget what an earlier owner of its name published. Raises WeightsUnavailable, RunTaken."""

    @abstractmethod
    def announce_initial(self) -> None:
        """Announce `INITIAL`, so that actors play with the weights of `model.path` before a learner publishes.

        Raises:
            WeightsUnavailable: not in time.
            RunTaken: another process owns the run.
        """

    def pool(self) -> SnapshotPool:
        """Where a publisher that makes snapshot after snapshot takes their memory from."""
        return MemoryPool()

    @abstractmethod
    def send(self, version: int, snapshot: Snapshot, digest: str | None = None) -> WeightVersion:
        """Store what the snapshot holds, or keep it for those who ask for it, and announce it as `version`.

        Args:
            version: policy version.
            snapshot: of the channel's `pool`, filled and unlocked. Afterwards whoever still needs it has a lock on it.
            digest: of its tensors (`services.weights.digest`), if it is known already.

        Raises:
            WeightsUnavailable: not stored in time; nothing is announced.
            RunTaken: another process owns the run; nothing is announced.
        """

    def make_room(self) -> None:  # noqa: B027 - most channels keep nothing here
        """Drop the versions before the newest. Raises WeightsUnavailable."""

    @abstractmethod
    def latest(self) -> WeightVersion | None:
        """The version published last, None before the first. Raises WeightsUnavailable, WeightsCorrupt."""

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> WeightVersion:
        """Announce a copy of `tensors` as `version`, from this process. Raises as `send`.

        Args:
            version: policy version.
            tensors: by Hugging Face name, on any device, in any layout.
        """
        layout = Layout.of(tensors)
        file = new_file(layout.nbytes)
        fill(file.places(layout), tensors.items())
        return self.send(version, file)

    def forget(self) -> None:  # noqa: B027 - most channels keep versions beyond the publisher's process
        """Take back the announcement if the publisher's process, which has died, alone could send the version."""

    def close_run(self) -> None:  # noqa: B027 - most channels have nothing to release
        """Release what the run's weights keep alive beyond its processes, once there is no reader any more."""

    def close(self) -> None:  # noqa: B027 - most channels have nothing to release
        """Release what this process holds of the channel. Published versions stay."""


class StoringChannel(WeightChannel):
    """A channel that stores versions, so that a reader gets one whenever it asks."""

    @abstractmethod
    def bring(self, wanted: WeightVersion) -> Delivery:
        """Bring a version to this node and verify it. The interpreter's lock is free meanwhile.

        Raises:
            WeightsGone: newer versions have replaced it.
            WeightsCorrupt: the checksum does not match.
            WeightsUnavailable: not read in time.
        """

    def fetch(self, wanted: WeightVersion) -> dict[str, torch.Tensor]:
        """Read the tensors of a version: read-only shared views, copy before writing. Raises as `bring`."""
        return self.bring(wanted).tensors()


def new_file(nbytes: int) -> MemoryFile:
    """A new file in memory. Raises WeightsUnavailable."""
    try:
        return MemoryFile(nbytes)
    except OSError as error:
        raise WeightsUnavailable(f"no memory for {nbytes / 2**20:,.0f} MiB of weights: {error.strerror}") from None


def in_memory(snapshot: Snapshot) -> MemoryFile:
    """The snapshot, which is of a `MemoryPool`."""
    assert isinstance(snapshot, MemoryFile)
    return snapshot


def verify(payload: Payload, wanted: WeightVersion) -> None:
    """Raise WeightsCorrupt unless size and checksum of the payload are those of `wanted`."""
    if payload.nbytes != wanted.nbytes or checksum(payload) != wanted.checksum:
        raise WeightsCorrupt(f"weights of version {wanted.version} are damaged: size or checksum mismatch")
