"""Episodes for outside services: `POST /episodes/next` waits for one, an attempt waits to be taken.

Invariants
- An offer is taken by at most one request. One whose client has left before it was told is offered again.
- Only as many tickets are leased as requests are waiting: one that nobody takes would lose its time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

LONGEST_WAIT_S = 30.0


class NextBody(BaseModel):
    """Body of `POST /episodes/next`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    wait_s: float = Field(LONGEST_WAIT_S, ge=0, le=LONGEST_WAIT_S)


class Offer:
    """An attempt that waits for a service.

    Args:
        episode: what the service gets.
    """

    def __init__(self, episode: Mapping[str, Any]) -> None:
        self.episode = episode
        self.taken = asyncio.Event()
        self.withdrawn = False


class Offers:
    """The attempts and the services of one actor that wait for each other, both in order."""

    def __init__(self) -> None:
        self._offers: deque[Offer] = deque()
        self._services: deque[asyncio.Future[Offer]] = deque()

    @property
    def waiting(self) -> int:
        """Number of requests that wait for an episode."""
        return sum(1 for service in self._services if not service.done())

    def offer(self, offer: Offer, *, first: bool = False) -> None:
        """Offer an attempt. `first`: before all others, since it was offered before."""
        while self._services:
            service = self._services.popleft()
            if not service.done():
                service.set_result(offer)
                return
        if first:
            self._offers.appendleft(offer)
        else:
            self._offers.append(offer)

    def withdraw(self, offer: Offer) -> None:
        """Take an offer back; a request that has just got it gets the next one."""
        offer.withdrawn = True
        if offer in self._offers:
            self._offers.remove(offer)

    async def next(self, wait_s: float, gone: asyncio.Event) -> Offer | None:
        """The next offer; None if there is none within `wait_s`, or the client has left.

        The caller calls `told` or `refused` with it.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while True:
            while self._offers:
                offer = self._offers.popleft()
                if not offer.withdrawn:
                    return offer
            service: asyncio.Future[Offer] = loop.create_future()
            leaving = asyncio.ensure_future(gone.wait())
            events: set[asyncio.Future[Any]] = {service, leaving}
            self._services.append(service)
            try:
                await asyncio.wait(
                    events, timeout=max(0.0, deadline - loop.time()), return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                leaving.cancel()
                if not service.done():
                    service.cancel()
                    self._services.remove(service)
            if service.cancelled():
                return None
            if gone.is_set():
                self.refused(service.result())
                return None
            if not service.result().withdrawn:
                return service.result()

    def told(self, offer: Offer) -> None:
        """The service has the offer."""
        offer.taken.set()

    def refused(self, offer: Offer) -> None:
        """The service left before it had the offer."""
        if not offer.withdrawn:
            self.offer(offer, first=True)
