"""Weight channel through collective transfers: the publisher broadcasts a version to all waiting readers at once.

A broadcast needs all receivers at the same time. So `receive` does not return tensors: it waits until the publisher
announces a round with this reader and returns how to join it; the engine then joins and receives. The publisher keeps
the announced version and serves rounds from its own thread, so that a reader may come late.

Invariants
- A round ends within the timeout. One that does not is abandoned with its group. Its readers repeat their requests,
  except for those that hang, which are dropped that way.
- Publishing never waits for a reader.
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

from services.errors import AnchorageError, RedisUnavailable
from services.process import ReservedPort
from services.weights.channel import WeightChannel, WeightVersion
from services.weights.coordination import Announcement, Coordination, TensorMeta
from services.weights.digest import digest
from services.weights.errors import WeightsGone, WeightsUnavailable
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
    """

    version: WeightVersion
    tensors: tuple[TensorMeta, ...]
    membership: Membership


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
        self, coordination: Coordination, sender: Callable[[], Sender], *, reader: str, width: int, timeout_s: float
    ) -> None:
        """Open one end of the channel.

        Args:
            coordination: the run's keys in Redis; closed with the channel.
            sender: makes the publisher's end of a new group.
            reader: name of this process among the readers.
            width: number of workers of its engine.
            timeout_s: timeout of every call and every round, in seconds.
        """
        self._coordination = coordination
        self._sender = sender
        self._reader = f"{reader}-{uuid.uuid4().hex[:8]}"
        self._width = width
        self._timeout_s = timeout_s
        self._seen_round = ("", 0)
        self._published: tuple[Announcement, dict[str, torch.Tensor]] | None = None
        self._stopping = threading.Event()
        self._server: threading.Thread | None = None

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> WeightVersion:
        kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        checksum = digest(kept.items())
        nbytes = sum(tensor.nbytes for tensor in kept.values())
        announced = WeightVersion(version, nbytes, checksum, f"{version}-{checksum}-{uuid.uuid4().hex[:8]}")
        metas = tuple(TensorMeta(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in kept.items())
        announcement = Announcement(announced, metas)
        self._published = (announcement, kept)
        if self._server is None:
            self._server = threading.Thread(target=self._serve, name="weight-rounds", daemon=True)
            self._server.start()
        try:
            self._coordination.announce(announcement)
        except AnchorageError as error:
            raise WeightsUnavailable(f"cannot announce version {version}: {error}") from None
        return announced

    def latest(self) -> WeightVersion | None:
        announcement = self._announced()
        return None if announcement is None else announcement.version

    def fetch(self, wanted: WeightVersion) -> dict[str, torch.Tensor]:
        """The tensors, for the publisher itself; readers call `receive`."""
        if self._published is None or self._published[0].version != wanted:
            raise WeightsGone(f"weights of version {wanted.version} are not in this process")
        return dict(self._published[1])

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
        membership = round_.membership(self._reader, CHECK_IN_SHARE * self._timeout_s)
        return Incoming(announcement.version, announcement.tensors, membership)

    def _serve(self) -> None:
        """Serve rounds, one after the other; the publisher's thread."""
        server = _Rounds(self._coordination, self._sender, self._timeout_s)
        while not self._stopping.wait(POLL_S):
            try:
                assert self._published is not None
                server.turn(*self._published)
            except AnchorageError as error:
                log.warning("weight transfer unavailable; retrying: %s", error)
            except Exception:
                log.exception("weight transfer failed; retrying")
        server.end()


class _Rounds:
    """Collects requests and serves them in rounds, in the publisher's thread."""

    def __init__(self, coordination: Coordination, sender: Callable[[], Sender], timeout_s: float) -> None:
        self._coordination = coordination
        self._make = sender
        self._timeout_s = timeout_s
        self._epochs = Epochs(uuid.uuid4().hex[:8])
        self._sender: Sender | None = None
        self._first_request: float | None = None

    def turn(self, announcement: Announcement, tensors: Mapping[str, torch.Tensor]) -> None:
        """Serve one round if there are requests for the announced version."""
        requests = [
            request for request in self._coordination.requests() if request.locator == announcement.version.locator
        ]
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
            round_ = self._epochs.round(announcement.version.locator, check_in_port)
            work = (self._sender, round_, None if whole else self._epochs.group, tensors, outcome)
            self._coordination.announce_round(round_)
            self._coordination.withdraw(*readers)
            # In a thread of its own: a broadcast whose receiver has died may never return.
            threading.Thread(target=self._send, args=work, name=f"weights-{round_.epoch}", daemon=True).start()
            self._await_outcome(round_, announcement, outcome, began)

    def end(self) -> None:
        """Leave the current group."""
        self._leave()

    def _send(
        self,
        sender: Sender,
        round_: Round,
        group: Group | None,
        tensors: Mapping[str, torch.Tensor],
        outcome: queue.Queue[Exception | None],
    ) -> None:
        try:
            check_in(round_.host, round_.check_in_port, 0, round_.world, CHECK_IN_SHARE * self._timeout_s)
            if group is not None:
                sender.open(group, self._timeout_s)
            sender.send(tensors, self._timeout_s)
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
