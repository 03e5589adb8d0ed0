"""A run that loses its name while a version travels does not announce that version."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch

from services.buffer import Buffer
from services.buffer.owner import Owner
from services.config.tree import BufferConfig, WeightsConfig
from services.errors import RunTaken
from services.weights import WeightChannel, collective, directory, open_channel
from services.weights.collective import CollectiveChannel
from services.weights.fence import Fence

Open = Callable[[Owner], WeightChannel]
WEIGHTS = {"a": torch.ones(5)}


@pytest.fixture
def taken(redis_url: str, run_name: str) -> Iterator[Callable[[], Owner]]:
    """Takes the run's name, each time for another owner of the same lineage."""
    with closing(Buffer.connect(redis_url, run_name, BufferConfig())) as buffer:

        def take() -> Owner:
            token = buffer.take(buffer.owner(), uuid.uuid4().hex, "lineage", "{}")
            assert token is not None
            return Owner(token, "lineage", "{}")

        yield take


@pytest.fixture(params=["directory", "gloo"])
def opened(request: pytest.FixtureRequest, redis_url: str, run_name: str, tmp_path: Path) -> Iterator[Open]:
    with ExitStack() as stack:

        def open_one(owner: Owner) -> WeightChannel:
            config = WeightsConfig.model_validate({"channel": request.param, "timeout_s": 20.0})
            channel = open_channel(config, run_name, tmp_path, redis_url=redis_url, owner=owner)
            stack.callback(channel.close)
            return channel

        yield open_one


def test_an_owner_announces_and_one_that_lost_the_name_does_not(opened: Open, taken: Callable[[], Owner]) -> None:
    first = opened(taken())
    first.open_run()
    published = first.publish(1, WEIGHTS)
    assert first.latest() == published
    second = opened(taken())
    second.open_run()
    mine = second.publish(7, WEIGHTS)
    for announce in (lambda: first.publish(2, WEIGHTS), first.announce_initial):
        with pytest.raises(RunTaken, match="in use"):
            announce()
        assert second.latest() == mine
        assert first.latest() == mine


def test_the_name_may_be_lost_while_the_version_travels(
    opened: Open, taken: Callable[[], Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is lost when the bytes are stored, or kept for those who ask, and nothing is announced yet."""
    channel = opened(taken())
    before = channel.publish(1, WEIGHTS)
    sends = isinstance(channel, CollectiveChannel)
    module, last_step = (collective, "digest_of") if sends else (directory, "checksum")
    whole = getattr(module, last_step)

    def and_then_taken(*arguments: object) -> object:
        try:
            return whole(*arguments)
        finally:
            taken()

    monkeypatch.setattr(module, last_step, and_then_taken)
    with pytest.raises(RunTaken):
        channel.publish(2, WEIGHTS)
    newest = channel.latest()
    # Taking the name removes what a publisher alone could send.
    assert newest == (None if sends else before)


def test_a_channel_takes_its_fence_along_to_the_rank(opened: Open, taken: Callable[[], Owner]) -> None:
    channel = opened(taken())
    there = pickle.loads(pickle.dumps(channel))
    assert there.same(channel)
    there.publish(1, WEIGHTS)
    taken()
    with pytest.raises(RunTaken):
        there.publish(2, WEIGHTS)
    there.close()


def test_redis_that_lost_the_owner_gets_it_back(redis_url: str, run_name: str, taken: Callable[[], Owner]) -> None:
    """As the buffer's calls do it: data of Redis that are lost are no other owner."""
    owner = taken()
    fence = Fence(redis_url, run_name, BufferConfig(), owner)
    with closing(Buffer.connect(redis_url, run_name, BufferConfig())) as buffer:
        buffer._client.delete(buffer._keys["owner"])
        fence.check()
        found = buffer.owner()
        assert found is not None
        assert found.token == owner.token
        assert found.beats == "0"  # no sign of life


def test_secrets_are_in_no_representation(run_name: str) -> None:
    owner = Owner("1-a", "lineage", "{}")
    url = "redis://:secret@127.0.0.1:1/0"
    fence = Fence(url, run_name, BufferConfig(), owner)
    channel = CollectiveChannel(url, run_name, BufferConfig(), "gloo", 1.0, owner)
    assert "secret" not in f"{fence!r} {channel!r}"
    channel.close()


def test_the_initial_version_is_announced_without_weights(opened: Open, taken: Callable[[], Owner]) -> None:
    channel = opened(taken())
    channel.announce_initial()
    newest = channel.latest()
    assert newest is not None
    assert newest.initial
    assert (newest.version, newest.nbytes) == (0, 0)
    assert not channel.publish(0, WEIGHTS).initial
