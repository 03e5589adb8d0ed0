"""Keep an engine on the newest announced policy version, updating at the moments that `weights.update` allows.

Invariants
- Nothing is sampled before the first announced version has been loaded.
- Loading into the engine takes at most `weights.timeout_s`: an engine that hangs ends its actor, not the run.
- A version that is unavailable is an error, unless a newer one has replaced it, which is then loaded.
- `in_flight` interrupts nothing; `at_step` waits until no response is being sampled, `at_episode` until no episode is
  being played, and both hold new ones back meanwhile.
- An engine that sleeps (`actors/card_turns.py`) loads nothing but the version that wakes it. What `at_step` and
  `at_episode` wait for is then waited for before it falls asleep.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from typing import TypeVar

from actors.engine.interface import EngineFailed, InferenceEngine, Sample
from services.backoff import Patience
from services.config.tree import WeightsConfig
from services.weights import Delivery, StoringChannel, WeightChannel, WeightsError, WeightVersion
from services.weights.collective import CollectiveChannel

logger = logging.getLogger(__name__)

POLL_S = 0.2
LOOKS = Patience(POLL_S, 2.0)
"""How often to look for a newer version, by the time since the last one."""
FETCH_ATTEMPTS = 3

_T = TypeVar("_T")


class SharedLock:
    """Many tasks hold it shared, or one exclusively. A task that waits for it exclusively goes before new shared ones.

    Example: two episodes hold `shared()`. An update enters `exclusive()`: a third episode now waits. When both episodes
    have ended the update runs; then the third episode starts.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._open = asyncio.Event()
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def open(self) -> bool:
        """Whether `shared` would enter at once."""
        return self._open.is_set()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        # Again after waking up: another update may have closed it in between.
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
    async def exclusive(self) -> AsyncIterator[None]:
        self._open.clear()
        try:
            await self._empty.wait()
            yield
        finally:
            self._open.set()


class LockedSampler:
    """The engine as episodes use it: each response holds a lock, shared.

    Args:
        engine: samples.
        lock: of the responses, see `WeightFollower.responses`.
    """

    def __init__(self, engine: InferenceEngine, lock: SharedLock) -> None:
        self._engine = engine
        self._lock = lock

    async def generate(
        self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int, stop: Sequence[str] = ()
    ) -> Sample:
        """As `InferenceEngine.generate`."""
        async with self._lock.shared():
            return await self._engine.generate(
                prompt_ids, temperature=temperature, max_tokens=max_tokens, seed=seed, stop=stop
            )


class WeightFollower:
    """Loads announced versions into one engine.

    Args:
        channel: announces versions.
        engine: to load them into.
        config: when to update, and its time limit.

    Attributes:
        responses: held shared by each response.
        episodes: held shared by each episode.
        awake: set while the engine has a version and memory to sample with it.
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
        self._loaded_at = time.monotonic()
        self._as_started = True
        self._loading = asyncio.Lock()
        self._asleep = AsyncExitStack()
        self.responses = SharedLock()
        self.episodes = SharedLock()
        self.awake = asyncio.Event()

    async def first(self) -> None:
        """Wait for an announced version and load the newest.

        Raises:
            EngineFailed: it is unavailable or does not fit the model.
        """
        while self._loaded is None:
            await self._load_newest()
            if self._loaded is None:
                await asyncio.sleep(POLL_S)
        self.awake.set()

    async def follow(self) -> None:
        """Load each newer version soon after it is announced. Ends only by an error, as `first`."""
        while True:
            await asyncio.sleep(LOOKS.delay(time.monotonic() - self._loaded_at))
            await self.catch_up()

    async def catch_up(self) -> None:
        """Load the newest version now, unless it is loaded. Raises as `first`.

        A ticket is issued after the version it relies on was announced. So an actor that catches up between leasing a
        ticket and playing it plays with that version or a newer one. Waits while the engine sleeps.
        """
        while True:
            await self.awake.wait()
            async with self._loading:
                if self.awake.is_set():
                    await self._load_newest()
                    return

    async def announced(self) -> bool:
        """Whether there is a version to load. Raises EngineFailed if the channel is unavailable."""

        async def newest() -> WeightVersion | None:
            return await asyncio.to_thread(self._channel.latest)

        return await self._retry(newest) is not None

    async def sleep(self) -> None:
        """Let the engine give its memory back, at a moment that `weights.update` allows. Raises EngineFailed."""
        self.awake.clear()
        await self._asleep.enter_async_context(self._update_moment())
        async with self._loading:
            await self.put_to_sleep()

    async def put_to_sleep(self) -> None:
        """As `sleep`, for an engine that samples nothing yet."""
        self._as_started = False
        await self._bounded(self._engine.sleep(), "to give its memory back")

    async def wake(self) -> bool:
        """Load the newest version, even if it was loaded before, which wakes the engine. False: none is announced."""
        async with self._loading:
            self._loaded = None
            await self._load_newest(nullcontext())
            if self._loaded is None:
                return False
        await self._asleep.aclose()
        self.awake.set()
        return True

    async def _load_newest(self, moment: AbstractAsyncContextManager[None] | None = None) -> None:
        """Load the newest version, unless it is loaded; `moment`: in which to, else when `weights.update` allows."""
        newest = await self._retry(self._newer)
        if newest is None:
            return
        if newest.initial:
            await self._load_initial(newest, moment)
            return
        if isinstance(self._channel, CollectiveChannel):
            loaded = await self._join_newest(self._channel)
        else:
            assert isinstance(self._channel, StoringChannel)
            loaded = await self._fetch_newest(self._channel, moment)
        if loaded is not None:
            self._loaded, self._loaded_at, self._as_started = loaded, time.monotonic(), False
            logger.info("loaded policy version %d (%.1f MB)", loaded.version, loaded.nbytes / 1e6)

    async def _load_initial(self, initial: WeightVersion, moment: AbstractAsyncContextManager[None] | None) -> None:
        """Load the weights of the model's folder, unless the engine has them since its start."""
        if not self._as_started:
            async with moment or self._update_moment():
                await self._bounded(self._engine.load_initial(), "to load the weights of model.path")
        self._loaded, self._loaded_at = initial, time.monotonic()

    async def _fetch_newest(
        self, channel: StoringChannel, moment: AbstractAsyncContextManager[None] | None
    ) -> WeightVersion | None:
        """Fetch and load the newest version. Returns it; None if it was loaded already or none is announced."""

        async def bring() -> Delivery | None:
            wanted = await self._newer()
            return None if wanted is None else await asyncio.to_thread(channel.bring, wanted)

        delivery = await self._retry(bring)
        if delivery is None:
            return None
        async with moment or self._update_moment():
            await self._bounded(self._engine.load_delivery(delivery), f"to load version {delivery.version.version}")
        return delivery.version

    async def _join_newest(self, channel: CollectiveChannel) -> WeightVersion | None:
        """As `_fetch_newest`, through a collective transfer.

        Holds the lock before it requests the transfer, because a receiver must join as soon as the transfer starts.
        """

        async def join() -> WeightVersion | None:
            wanted = await self._newer()
            if wanted is not None:
                incoming = await asyncio.to_thread(channel.receive, wanted)
                await self._bounded(self._engine.receive_weights(incoming), f"to load version {wanted.version}")
            return wanted

        async with self._update_moment():
            return await self._retry(join)

    async def _newer(self) -> WeightVersion | None:
        """The newest announced version; None if it is loaded already or none is announced."""
        newest = await asyncio.to_thread(self._channel.latest)
        return None if newest == self._loaded else newest

    def _update_moment(self) -> AbstractAsyncContextManager[None]:
        """A context in which the engine may change its version, as `weights.update` says."""
        if self._update == "at_step":
            return self.responses.exclusive()
        if self._update == "at_episode":
            return self.episodes.exclusive()
        return nullcontext()

    async def _bounded(self, call: Awaitable[None], what: str) -> None:
        """Wait for a call of the engine. Raises EngineFailed after `weights.timeout_s`."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await call
        except TimeoutError:
            raise EngineFailed(
                f"the engine took longer than {self._timeout_s:g} s {what} (weights.timeout_s)"
            ) from None

    async def _retry(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Result of `call`, which is retried after a WeightsError. Raises EngineFailed after `FETCH_ATTEMPTS`."""
        for attempt in range(1, FETCH_ATTEMPTS + 1):
            try:
                return await call()
            except WeightsError as error:
                logger.warning("newest policy version unavailable, attempt %d: %s", attempt, error)
                failure = EngineFailed(f"the newest policy version is unavailable: {error}")
            await asyncio.sleep(POLL_S)
        raise failure
