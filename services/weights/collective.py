"""Weight channel through collective transfers: the publisher broadcasts a version to all waiting readers at once.

A broadcast needs all receivers at the same time. So `receive` does not return tensors: it waits until the publisher
announces a round with this reader and returns how to join it; the engine then joins and receives. The publisher,
learner rank 0, keeps the snapshot of the announced version in host memory and serves rounds from its own thread: the
first readers and late ones get the same bytes, while the learner goes on.

Invariants
- A round ends within the timeout. One that does not is abandoned with its group. Its readers repeat their requests,
  except for those that hang, which are dropped that way.
- Publishing never waits for a reader.
- A snapshot is under a lock (`services.weights.memory`) while it is announced or sent, so it is not written over.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.buffer.owner import Owner
from services.config.tree import BufferConfig
from services.errors import AnchorageError, RedisUnavailable, RunTaken
from services.process import ReservedPort
from services.weights.channel import INITIAL, WeightChannel, WeightVersion
from services.weights.coordination import Announcement, Coordination, TensorMeta
from services.weights.digest import digest as digest_of
from services.weights.errors import WeightsGone, WeightsUnavailable
from services.weights.memory import Snapshot, SnapshotPool
from services.weights.rendezvous import CHECK_IN_SHARE, check_in
from services.weights.rounds import Epochs, Group, Membership, Request, Round

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

POLL_S = 0.05
GATHER_S = 0.5
"""How long to collect requests for a new group. Readers that match the current group are served at once."""
_CLOSING_S = 5.0


@dataclass(frozen=True)
class Incoming:
    """A version that is about to be sent.

    Attributes:
        version: its `checksum` is the `digest` of the tensors.
        tensors: what will come, in this order.
        membership: how to take part. Whoever joins checks in first (`services.weights.rendezvous`).
        timeout_s: of the round, in seconds.
    """

    version: WeightVersion
    tensors: tuple[TensorMeta, ...]
    membership: Membership
    timeout_s: float


@dataclass(frozen=True)
class _Published:
    """The version that this process sends to those who ask for it.

    Attributes:
        announcement: of the version.
        tensors: views of the snapshot, in the order of the announcement.
        kept: keeps the snapshot from being written over, until the last reference to this object is gone.
    """

    announcement: Announcement
    tensors: Mapping[str, torch.Tensor]
    kept: object


class Sender(ABC):
    """The publisher's end of a process group, rank 0. One object per epoch, used from one thread except for `close`."""

    @abstractmethod
    def open(self, group: Group, timeout_s: float) -> None:
        """Form the group with the other members. After any exception the group is lost."""

    @abstractmethod
    def send(self, tensors: Mapping[str, torch.Tensor], timeout_s: float) -> None:
        """Broadcast the tensors in their order. After any exception the group is lost."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group, or abort it from another thread. Idempotent."""


class CollectiveChannel(WeightChannel):
    """Weight channel with one publisher, which keeps the newest version, and any number of readers."""

    def __init__(
        self,
        redis_url: str,
        run: str,
        config: BufferConfig,
        transport: str,
        timeout_s: float,
        owner: Owner | None = None,
        reader: str = "publisher",
        width: int = 1,
    ) -> None:
        """Open one end of the channel. Does not connect yet.

        Args:
            redis_url: address of the run's Redis.
            run: name of the run.
            config: limits and timeouts of the connection to Redis.
            transport: `nccl`, `gloo` or `ipc`.
            timeout_s: timeout of every call and every round, in seconds.
            owner: of the run's name, for the publisher.
            reader: name of this process among the readers.
            width: number of workers of its engine.
        """
        super().__init__(redis_url, run, config, transport, timeout_s, owner, reader, width)
        self._coordination = Coordination(redis_url, run, config, owner)
        self._transport = transport
        self._reader = f"{reader}-{uuid.uuid4().hex[:8]}"
        self._width = width
        self._timeout_s = timeout_s
        self._seen_round = ("", 0)
        self._published: _Published | None = None
        self._stopping = threading.Event()
        self._server: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._transport}, {self._reader})"  # without the address, which has a password

    def open_run(self) -> None:
        self._announcing("cannot begin the run", self._coordination.clear)

    def forget(self) -> None:
        self._announcing("cannot take back the announcement", self._coordination.clear)

    def announce_initial(self) -> None:
        announcement = Announcement(INITIAL, ())
        self._announcing("cannot announce version 0", lambda: self._coordination.announce(announcement))

    def pool(self) -> SnapshotPool:
        if self._transport != "ipc":
            return super().pool()
        from services.weights.ipc import CardPool

        return CardPool(self._timeout_s)

    def make_room(self) -> None:
        if self._transport == "ipc":  # the next snapshot takes the place of this one
            self._published = None
            self.forget()

    def send(self, version: int, snapshot: Snapshot, digest: str | None = None) -> WeightVersion:
        tensors = snapshot.tensors()
        checksum = digest or digest_of(tensors.items())
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        announced = WeightVersion(version, nbytes, checksum, f"{version}-{checksum}-{uuid.uuid4().hex[:8]}")
        metas = tuple(TensorMeta(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items())
        self._published = _Published(Announcement(announced, metas), tensors, snapshot.keep())
        if self._server is None:
            self._server = threading.Thread(target=self._serve, name="weight-rounds", daemon=True)
            self._server.start()
        announcement = self._published.announcement
        self._announcing(f"cannot announce version {version}", lambda: self._coordination.announce(announcement))
        return announced

    @staticmethod
    def _announcing(failure: str, announce: Callable[[], None]) -> None:
        try:
            announce()
        except RunTaken:
            raise
        except AnchorageError as error:
            raise WeightsUnavailable(f"{failure}: {error}") from None

    def latest(self) -> WeightVersion | None:
        announcement = self._announced()
        return None if announcement is None else announcement.version

    def receive(self, wanted: WeightVersion) -> Incoming:
        """Request a version and wait for a round with this reader.

        Raises:
            WeightsGone: a newer version has been announced.
            WeightsUnavailable: no round in time, or Redis is unreachable.
        """
        deadline = time.monotonic() + self._timeout_s
        request = Request(self._reader, wanted.locator, self._width)
        try:
            announcement = self._require(wanted)
            while time.monotonic() < deadline:
                self._coordination.request(request)
                # Join the round even if a newer version has been announced since: the other members wait for this one.
                if (round_ := self._round_to_join(wanted)) is not None:
                    return self._incoming(announcement, round_)
                self._require(wanted)
                time.sleep(POLL_S)
        except RedisUnavailable as error:
            raise WeightsUnavailable(f"cannot request version {wanted.version}: {error}") from None
        except WeightsGone:
            self._coordination.withdraw(self._reader)
            raise
        self._coordination.withdraw(self._reader)
        raise WeightsUnavailable(
            f"no transfer of version {wanted.version} began within weights.timeout_s ({self._timeout_s:g} s)"
        )

    def close(self) -> None:
        self._stopping.set()
        if self._server is not None:
            self._server.join(min(_CLOSING_S, self._timeout_s))
        self._coordination.close()

    def _announced(self) -> Announcement | None:
        try:
            return self._coordination.announced()
        except AnchorageError as error:
            raise WeightsUnavailable(f"cannot read the newest version: {error}") from None

    def _require(self, wanted: WeightVersion) -> Announcement:
        announcement = self._announced()
        if announcement is None or announcement.version != wanted:
            raise WeightsGone(f"weights of version {wanted.version} are no longer kept")
        return announcement

    def _round_to_join(self, wanted: WeightVersion) -> Round | None:
        """The announced round of this version that this reader must join, None if there is none."""
        round_ = self._coordination.round()
        if round_ is None or self._reader not in round_.first_ranks or round_.locator != wanted.locator:
            return None
        if (round_.epoch, round_.number) == self._seen_round:
            return None
        self._seen_round = (round_.epoch, round_.number)
        self._coordination.withdraw(self._reader)
        return round_

    def _incoming(self, announcement: Announcement, round_: Round) -> Incoming:
        membership = round_.membership(self._reader, self._transport, CHECK_IN_SHARE * self._timeout_s)
        return Incoming(announcement.version, announcement.tensors, membership, self._timeout_s)

    def _serve(self) -> None:
        """Serve rounds, one after the other; the publisher's thread."""
        server = _Rounds(self._coordination, sender_of(self._transport), self._timeout_s)
        while not self._stopping.wait(POLL_S):
            try:
                if (published := self._published) is not None:
                    server.turn(published)
                del published
            except RunTaken as error:
                log.warning("sending no more weights: %s", error)
                break
            except AnchorageError as error:
                log.warning("weight transfer unavailable; retrying: %s", error)
            except Exception:
                log.exception("weight transfer failed; retrying")
        server.end()


def sender_of(transport: str) -> Callable[[], Sender]:
    """What makes the publisher's end of a new group."""
    if transport == "gloo":
        from services.weights.gloo import GlooSender

        return GlooSender
    if transport == "ipc":
        from services.weights.ipc import IpcSender

        return IpcSender
    from services.weights.nccl import NcclSender

    return NcclSender


class _Rounds:
    """Collects requests and serves them in rounds, in the publisher's thread."""

    def __init__(self, coordination: Coordination, sender: Callable[[], Sender], timeout_s: float) -> None:
        self._coordination = coordination
        self._make = sender
        self._timeout_s = timeout_s
        self._epochs = Epochs(uuid.uuid4().hex[:8])
        self._sender: Sender | None = None
        self._first_request: float | None = None

    def turn(self, published: _Published) -> None:
        """Serve one round if there are requests for the announced version."""
        locator = published.announcement.version.locator
        requests = [request for request in self._coordination.requests() if request.locator == locator]
        if not requests:
            self._first_request = None
            return
        self._first_request = self._first_request or time.monotonic()
        whole = self._epochs.fits(requests)
        if not whole and time.monotonic() - self._first_request < GATHER_S:
            return
        self._first_request = None
        readers = [request.reader for request in requests]
        began = time.monotonic()
        outcome: queue.Queue[Exception | None] = queue.Queue(1)
        with ExitStack() as reserved:  # no other process may take the ports before the members connect
            if not whole:
                self._leave()
                self._epochs.open(requests, _own_address(), reserved.enter_context(ReservedPort()).number)
                self._sender = self._make()
            check_in_port = reserved.enter_context(ReservedPort()).number
            round_ = self._epochs.round(locator, check_in_port)
            work = (self._sender, round_, None if whole else self._epochs.group, published, outcome)
            self._coordination.announce_round(round_)
            self._coordination.withdraw(*readers)
            # In a thread of its own: a broadcast whose receiver has died may never return.
            threading.Thread(target=self._send, args=work, name=f"weights-{round_.epoch}", daemon=True).start()
            self._await_outcome(round_, published.announcement, outcome, began)

    def end(self) -> None:
        """Leave the current group."""
        self._leave()

    def _send(
        self,
        sender: Sender,
        round_: Round,
        group: Group | None,
        published: _Published,
        outcome: queue.Queue[Exception | None],
    ) -> None:
        try:
            check_in(round_.host, round_.check_in_port, 0, round_.world, CHECK_IN_SHARE * self._timeout_s)
            if group is not None:
                sender.open(group, self._timeout_s)
            sender.send(published.tensors, self._timeout_s)
        except Exception as error:  # after any error the group is lost
            outcome.put(error)
        else:
            outcome.put(None)

    def _await_outcome(
        self, round_: Round, announcement: Announcement, outcome: queue.Queue[Exception | None], began: float
    ) -> None:
        version, readers = announcement.version.version, len(round_.first_ranks)
        try:
            error = outcome.get(timeout=self._timeout_s)
        except queue.Empty:
            error = TimeoutError(f"timeout after weights.timeout_s ({self._timeout_s:g} s)")
        if error is None:
            log.info("sent version %d to %d readers in %.2f s", version, readers, time.monotonic() - began)
            return
        log.warning(
            "transfer of version %d to %d readers failed, epoch %s ends: %s", version, readers, round_.epoch, error
        )
        self._leave()

    def _leave(self) -> None:
        sender, self._sender = self._sender, None
        self._epochs.drop()
        if sender is not None:
            sender.close()


def _own_address() -> str:
    """The address at which other nodes reach this one; loopback if there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # UDP: sends nothing, only selects the outgoing interface
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
