"""Weights through a collective transfer (a broadcast): the publisher sends a version to all who wait for it at once.

A broadcast needs every receiver at the same time, so `receive` does not hand out tensors: it waits until the publisher
calls a round in which this reader takes part, and says where to join it; the engine joins and receives. The publisher
keeps the announced version and serves rounds from a thread of its own, so that a reader may come late.

Invariants
- A round ends within the time limit. One that does not is given up with its group; its readers wish again, and those
  that hang are not among them: they are dropped, and the publisher is never held up.
- Who publishes never waits for a reader.
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
from services.weights.channel import WeightChannel, WeightsGone, WeightsUnavailable, WeightVersion
from services.weights.coordination import Announcement, Board, TensorMeta
from services.weights.digest import digest
from services.weights.rendezvous import MEETING_SHARE, meet
from services.weights.rounds import Epochs, Group, Round, Wish

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

POLL_S = 0.05
GATHER_S = 0.5
"""How long the readers of a new group may take to come together; the present group's go at once."""
_CLOSING_S = 5.0


@dataclass(frozen=True)
class Incoming:
    """A version on its way: where to join, and what will come. `version.checksum` is the `digest` of the tensors.

    Whoever joins checks in at the `meeting_port` first (`meet`), within `meeting_s` seconds.
    """

    version: WeightVersion
    tensors: tuple[TensorMeta, ...]
    epoch: str
    host: str
    port: int
    meeting_port: int
    meeting_s: float
    first_rank: int
    world: int


class Sender(ABC):
    """The publisher's end of a group, rank 0. One object an epoch; used from one thread, but for `close`."""

    @abstractmethod
    def open(self, group: Group, timeout_s: float) -> None:
        """Meet the other members. Any exception: the group is lost."""

    @abstractmethod
    def send(self, tensors: Mapping[str, torch.Tensor], timeout_s: float) -> None:
        """Broadcast the tensors in their order. Any exception: the group is lost."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group, or break it off from another thread; bears repetition."""


class CollectiveChannel(WeightChannel):
    """One publisher, which keeps the newest version only; any number of readers, early or late."""

    def __init__(
        self, board: Board, sender: Callable[[], Sender], *, reader: str, width: int, timeout_s: float
    ) -> None:
        """`reader` names this process among the readers, `width` is the number of its engine's workers."""
        self._board = board
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
            self._board.announce(announcement)
        except AnchorageError as error:
            raise WeightsUnavailable(f"version {version} cannot be announced: {error}") from None
        return announced

    def latest(self) -> WeightVersion | None:
        announcement = self._announced()
        return None if announcement is None else announcement.version

    def fetch(self, wanted: WeightVersion) -> dict[str, torch.Tensor]:
        """The tensors, for the publisher itself; readers `receive`."""
        if self._published is None or self._published[0].version != wanted:
            raise WeightsGone(f"weights of version {wanted.version} are not kept in this process")
        return dict(self._published[1])

    def receive(self, wanted: WeightVersion) -> Incoming:
        """Wait for a round of this version in which this reader takes part.

        Raises:
            WeightsGone: a newer version has been announced.
            WeightsUnavailable: no round in time: the publisher is away.
        """
        deadline = time.monotonic() + self._timeout_s
        wish = Wish(self._reader, wanted.locator, self._width)
        try:
            announcement = self._require(wanted)
            while time.monotonic() < deadline:
                self._board.wish(wish)
                # Whoever is called comes, even when a newer version has been announced meanwhile: others wait for him.
                if (called := self._called(wanted)) is not None:
                    return self._incoming(announcement, called)
                self._require(wanted)
                time.sleep(POLL_S)
        except RedisUnavailable as error:
            raise WeightsUnavailable(f"version {wanted.version} cannot be asked for: {error}") from None
        except WeightsGone:
            self._board.withdraw(self._reader)
            raise
        self._board.withdraw(self._reader)
        raise WeightsUnavailable(
            f"no transfer of version {wanted.version} began within weights.timeout_s ({self._timeout_s:g} s)"
        )

    def close(self) -> None:
        self._stopping.set()
        if self._server is not None:
            self._server.join(min(_CLOSING_S, self._timeout_s))
        self._board.close()

    def _announced(self) -> Announcement | None:
        try:
            return self._board.announced()
        except AnchorageError as error:
            raise WeightsUnavailable(f"the newest version cannot be asked for: {error}") from None

    def _require(self, wanted: WeightVersion) -> Announcement:
        announcement = self._announced()
        if announcement is None or announcement.version != wanted:
            raise WeightsGone(f"weights of version {wanted.version} are no longer kept")
        return announcement

    def _called(self, wanted: WeightVersion) -> Round | None:
        """The round that this reader is to join, when it has been called."""
        called = self._board.round()
        if called is None or self._reader not in called.first_ranks or called.locator != wanted.locator:
            return None
        if (called.epoch, called.number) == self._seen_round:
            return None
        self._seen_round = (called.epoch, called.number)
        self._board.withdraw(self._reader)
        return called

    def _incoming(self, announcement: Announcement, called: Round) -> Incoming:
        return Incoming(
            announcement.version,
            announcement.tensors,
            called.epoch,
            called.host,
            called.port,
            called.meeting_port,
            MEETING_SHARE * self._timeout_s,
            called.first_ranks[self._reader],
            called.world,
        )

    def _serve(self) -> None:
        """The publisher's thread: rounds, one after the other."""
        server = _Rounds(self._board, self._sender, self._timeout_s)
        while not self._stopping.wait(POLL_S):
            try:
                assert self._published is not None
                server.turn(*self._published)
            except AnchorageError as error:
                log.warning("no weights can be sent for the moment: %s", error)
            except Exception:
                log.exception("a transfer of weights failed")
        server.end()


class _Rounds:
    """Gathers wishes and sends; for the publisher's thread."""

    def __init__(self, board: Board, sender: Callable[[], Sender], timeout_s: float) -> None:
        self._board = board
        self._make = sender
        self._timeout_s = timeout_s
        self._epochs = Epochs(uuid.uuid4().hex[:8])
        self._sender: Sender | None = None
        self._first_wish: float | None = None

    def turn(self, announcement: Announcement, tensors: Mapping[str, torch.Tensor]) -> None:
        """A round, if there is somebody for it."""
        wishes = [wish for wish in self._board.wishes() if wish.locator == announcement.version.locator]
        if not wishes:
            self._first_wish = None
            return
        self._first_wish = self._first_wish or time.monotonic()
        whole = self._epochs.fits(wishes)
        if not whole and time.monotonic() - self._first_wish < GATHER_S:
            return
        self._first_wish = None
        readers = [wish.reader for wish in wishes]
        began = time.monotonic()
        outcome: queue.Queue[Exception | None] = queue.Queue(1)
        with ExitStack() as reserved:  # both ports stay ours until the members have met there
            if not whole:
                self._leave()
                self._epochs.open(wishes, _own_address(), reserved.enter_context(ReservedPort()).number)
                self._sender = self._make()
            meeting_port = reserved.enter_context(ReservedPort()).number
            called = self._epochs.round(announcement.version.locator, meeting_port)
            work = (self._sender, called, None if whole else self._epochs.group, tensors, outcome)
            self._board.call_round(called)
            self._board.withdraw(*readers)
            # A thread of its own: a broadcast whose receiver has gone may never return.
            threading.Thread(target=self._send, args=work, name=f"weights-{called.epoch}", daemon=True).start()
            self._judge(called, announcement, outcome, began)

    def end(self) -> None:
        self._leave()

    def _send(
        self,
        sender: Sender,
        called: Round,
        group: Group | None,
        tensors: Mapping[str, torch.Tensor],
        outcome: queue.Queue[Exception | None],
    ) -> None:
        try:
            meet(called.host, called.meeting_port, 0, called.world, MEETING_SHARE * self._timeout_s)
            if group is not None:
                sender.open(group, self._timeout_s)
            sender.send(tensors, self._timeout_s)
        except Exception as error:  # whatever it is, the group is lost
            outcome.put(error)
        else:
            outcome.put(None)

    def _judge(
        self, called: Round, announcement: Announcement, outcome: queue.Queue[Exception | None], began: float
    ) -> None:
        version, readers = announcement.version.version, len(called.first_ranks)
        try:
            error = outcome.get(timeout=self._timeout_s)
        except queue.Empty:
            error = TimeoutError(f"not done within weights.timeout_s ({self._timeout_s:g} s)")
        if error is None:
            log.info("version %d sent to %d readers in %.2f s", version, readers, time.monotonic() - began)
            return
        log.warning("epoch %s is given up, version %d to %d readers: %s", called.epoch, version, readers, error)
        self._leave()

    def _leave(self) -> None:
        sender, self._sender = self._sender, None
        self._epochs.drop()
        if sender is not None:
            sender.close()


def _own_address() -> str:
    """The address by which other nodes reach this one; the loopback's where there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: it only asks which way packets would go
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
