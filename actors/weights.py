"""Keeps an engine on the newest announced policy version, at the moments `weights.update` allows.

Invariants
- Nothing is sampled before the first announced version has been loaded.
- Loading into the engine takes at most `weights.timeout_s`: an engine that hangs ends its actor, not the run.
- A version that cannot be had is an error, unless a newer one has taken its place: then that one is loaded.
- `in_flight` interrupts nobody; `at_step` waits until no response is being sampled, `at_episode` until no episode is
  being played, and holds new ones back meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, TypeVar

from actors.engine.interface import EngineFailed, InferenceEngine, Sample
from services.config.tree import WeightsConfig
from services.weights import WeightChannel, WeightsError, WeightVersion
from services.weights.collective import CollectiveChannel

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

POLL_S = 0.2
FETCH_ATTEMPTS = 3

_T = TypeVar("_T")


class Gate:
    """Many may be inside at once; closing it keeps newcomers out and waits until it is empty."""

    def __init__(self) -> None:
        self._inside = 0
        self._open = asyncio.Event()
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def open(self) -> bool:
        return self._open.is_set()

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        while not self._open.is_set():
            await self._open.wait()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        self._open.clear()
        try:
            await self._empty.wait()
            yield
        finally:
            self._open.set()


class GatedSampler:
    """The engine as the episodes see it: every response passes the gate."""

    def __init__(self, engine: InferenceEngine, gate: Gate) -> None:
        self._engine = engine
        self._gate = gate

    async def generate(self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int) -> Sample:
        async with self._gate.entered():
            return await self._engine.generate(prompt_ids, temperature=temperature, max_tokens=max_tokens, seed=seed)


class WeightFollower:
    """Loads announced versions into one engine.

    Attributes:
        responses: gate around each response. episodes: gate around each episode.
    """

    def __init__(
        self,
        channel: WeightChannel,
        engine: InferenceEngine,
        config: WeightsConfig,
    ) -> None:
        self._channel = channel
        self._engine = engine
        self._update = config.update
        self._timeout_s = config.timeout_s
        self._loaded: WeightVersion | None = None
        self._loading = asyncio.Lock()
        self.responses = Gate()
        self.episodes = Gate()

    async def first(self) -> None:
        """Wait for an announced version and load the newest.

        Raises:
            EngineFailed: it cannot be had or does not fit.
        """
        while self._loaded is None:
            await self._load_newest()
            if self._loaded is None:
                await asyncio.sleep(POLL_S)

    async def follow(self) -> None:
        """Load each newer version soon after it is announced; ends only by an error, as for `first`."""
        while True:
            await asyncio.sleep(POLL_S)
            await self.catch_up()

    async def catch_up(self) -> None:
        """Load the newest version now, if it is not loaded; errors as for `first`.

        A ticket is issued after the version it may count on was announced: who catches up between leasing a ticket and
        playing it plays with no older one.
        """
        async with self._loading:
            await self._load_newest()

    async def _load_newest(self) -> None:
        if isinstance(self._channel, CollectiveChannel):
            loaded = await self._join_newest(self._channel)
        else:
            loaded = await self._fetch_newest(self._channel)
        if loaded is not None:
            self._loaded = loaded
            logger.info("loaded policy version %d (%.1f MB)", loaded.version, loaded.nbytes / 1e6)

    async def _fetch_newest(self, channel: WeightChannel) -> WeightVersion | None:
        """The version that was loaded; None where the newest is loaded already, or none is announced."""

        async def fetch() -> tuple[WeightVersion, dict[str, torch.Tensor]] | None:
            wanted = await self._newer()
            return None if wanted is None else (wanted, await asyncio.to_thread(channel.fetch, wanted))

        found = await self._persist(fetch)
        if found is None:
            return None
        wanted, tensors = found
        async with self._interrupting():
            await self._bounded(self._engine.load_weights(wanted.version, tensors), wanted)
        return wanted

    async def _join_newest(self, channel: CollectiveChannel) -> WeightVersion | None:
        """The same. Whoever is called to a transfer must come at once: nobody is in the way when it is asked for."""

        async def join() -> WeightVersion | None:
            wanted = await self._newer()
            if wanted is not None:
                incoming = await asyncio.to_thread(channel.receive, wanted)
                await self._bounded(self._engine.receive_weights(incoming), wanted)
            return wanted

        if await self._persist(self._newer) is None:
            return None
        async with self._interrupting():
            return await self._persist(join)

    async def _newer(self) -> WeightVersion | None:
        newest = await asyncio.to_thread(self._channel.latest)
        return None if newest == self._loaded else newest

    def _interrupting(self) -> AbstractAsyncContextManager[None]:
        """The moment at which the engine may take another version."""
        if self._update == "at_step":
            return self.responses.closed()
        if self._update == "at_episode":
            return self.episodes.closed()
        return nullcontext()

    async def _bounded(self, loading: Awaitable[None], wanted: WeightVersion) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await loading
        except TimeoutError:
            raise EngineFailed(
                f"the engine took longer than {self._timeout_s:g} s to load version {wanted.version} "
                "(weights.timeout_s)"
            ) from None

    async def _persist(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """What `ask` answers, asked again a few times."""
        for attempt in range(1, FETCH_ATTEMPTS + 1):
            try:
                return await ask()
            except WeightsError as error:
                logger.warning("the newest policy version cannot be had, attempt %d: %s", attempt, error)
                failure = EngineFailed(f"the newest policy version cannot be had: {error}")
            await asyncio.sleep(POLL_S)
        raise failure
