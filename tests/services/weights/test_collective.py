from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from actors.engine.interface import EngineFailed
from actors.weights import WeightFollower
from services.config.tree import BufferConfig, WeightsConfig
from services.weights import TransferLost, WeightsError, WeightsGone, WeightsUnavailable, open_channel
from services.weights.collective import CollectiveChannel, Incoming
from services.weights.coordination import Coordination
from services.weights.digest import digest
from services.weights.rendezvous import check_in
from services.weights.rounds import Request
from tests.actors.scripted_engine import ScriptedEngine, tokenizer_folder
from tests.services.weights.receiver import Receiver
from tests.waiting import until

TIMEOUT_S = 20.0

Opener = Callable[..., CollectiveChannel]


def tensors(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {
        "embed": torch.randn(70, 50, generator=generator),
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(1.5 + version),
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class GatheringCoordination(Coordination):
    """Shows requests to the publisher once there are `expected`: the members of a round must not depend on timing."""

    expected = 1

    def requests(self) -> list[Request]:
        requests = super().requests()
        return requests if len(requests) >= self.expected else []


def channel_of(url: str, run: str, reader: str, timeout_s: float = TIMEOUT_S) -> CollectiveChannel:
    channel = CollectiveChannel(url, run, BufferConfig(), "gloo", timeout_s, None, reader)
    channel._coordination.close()
    channel._coordination = GatheringCoordination(url, run, BufferConfig())
    return channel


def expect(publisher: CollectiveChannel, readers: int) -> None:
    """Rounds are of so many readers from now on."""
    assert isinstance(publisher._coordination, GatheringCoordination)
    publisher._coordination.expected = readers


@pytest.fixture
def open_one(redis_url: str, run_name: str) -> Iterator[Opener]:
    opened: list[CollectiveChannel] = []

    def open_(reader: str, timeout_s: float = TIMEOUT_S) -> CollectiveChannel:
        opened.append(channel_of(redis_url, run_name, reader, timeout_s))
        return opened[-1]

    yield open_
    for channel in opened:
        channel.close()


class Reader:
    """A channel and the receiving end of an engine."""

    def __init__(self, channel: CollectiveChannel) -> None:
        self.channel = channel
        self.receiver = Receiver()

    def newest(self) -> dict[str, torch.Tensor]:
        wanted = self.channel.latest()
        assert wanted is not None
        return self.receiver.load(self.channel.receive(wanted))


def all_at_once(readers: list[Reader]) -> list[dict[str, torch.Tensor]]:
    with ThreadPoolExecutor(len(readers)) as threads:
        return list(threads.map(Reader.newest, readers))


def read_for_ever(url: str, run: str, name: str, pipe: Connection) -> None:
    """A reader's process: a line for every version that it has loaded."""
    channel, receiver, loaded = channel_of(url, run, name), Receiver(), None
    while True:
        wanted = channel.latest()
        if wanted is None or wanted == loaded:
            time.sleep(0.02)
            continue
        try:
            received = receiver.load(channel.receive(wanted))
        except (WeightsError, TimeoutError) as error:
            pipe.send((type(error).__name__, receiver.epoch, False))
            continue
        loaded = wanted
        pipe.send((wanted.version, receiver.epoch, same(received, tensors(wanted.version))))


def test_processes_receive_every_version_and_one_that_is_killed_is_left_out(
    open_one: Opener, redis_url: str, run_name: str
) -> None:
    publisher = open_one("publisher")
    expect(publisher, 2)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for name in ("one", "other"):
        here, there = context.Pipe()
        processes.append(context.Process(target=read_for_ever, args=(redis_url, run_name, name, there), daemon=True))
        pipes.append(here)
    for process in processes:
        process.start()

    def next_of(pipe: Connection, version: int) -> str:
        while True:
            assert pipe.poll(300), f"version {version} never came"
            loaded, epoch, intact = pipe.recv()
            if loaded == version:
                assert intact
                return str(epoch)

    try:
        for version in (1, 2):
            publisher.publish(version, tensors(version))
            epochs = [next_of(pipe, version) for pipe in pipes]
        assert epochs[0] == epochs[1]
        processes[1].kill()
        processes[1].join()
        expect(publisher, 1)
        publisher.publish(3, tensors(3))
        assert next_of(pipes[0], 3) != epochs[0]
    finally:
        for process in processes:
            process.kill()


def test_the_same_readers_keep_their_group_and_a_newcomer_makes_another(open_one: Opener) -> None:
    publisher = open_one("publisher")
    expect(publisher, 2)
    readers = [Reader(open_one(name)) for name in ("a", "b")]
    epochs = []
    for version in (1, 2):
        publisher.publish(version, tensors(version))
        assert all(same(got, tensors(version)) for got in all_at_once(readers))
        epochs.append({reader.receiver.epoch for reader in readers})
    assert epochs[0] == epochs[1]
    assert len(epochs[0]) == 1
    readers.append(Reader(open_one("late")))
    expect(publisher, 3)
    publisher.publish(3, tensors(3))
    assert all(same(got, tensors(3)) for got in all_at_once(readers))
    assert {reader.receiver.epoch for reader in readers}.isdisjoint(epochs[0])


def test_a_late_reader_gets_the_version_too(open_one: Opener) -> None:
    open_one("publisher").publish(1, tensors(1))
    assert same(Reader(open_one("early")).newest(), tensors(1))
    assert same(Reader(open_one("late")).newest(), tensors(1))


def test_a_reader_that_hangs_is_dropped_and_the_others_go_on(open_one: Opener) -> None:
    publisher = open_one("publisher", 4.0)
    expect(publisher, 2)
    hanging, well = open_one("hanging", 4.0), Reader(open_one("well", 4.0))
    publisher.publish(1, tensors(1))
    wanted = well.channel.latest()
    assert wanted is not None
    with ThreadPoolExecutor(2) as threads:
        called = threads.submit(hanging.receive, wanted)  # and never joins
        lost = threads.submit(well.newest)
        assert "hanging" in "".join(_members(called.result(), publisher))
        with pytest.raises(TimeoutError, match="not all 3 ranks"):
            lost.result()
    expect(publisher, 1)
    assert same(well.newest(), tensors(1))


def _members(incoming: Incoming, publisher: CollectiveChannel) -> list[str]:
    called = publisher._coordination.round()
    assert called is not None
    assert called.epoch == incoming.membership.epoch
    return list(called.first_ranks)


def test_a_version_that_was_replaced_is_gone(open_one: Opener) -> None:
    publisher, reader = open_one("publisher"), open_one("reader")
    first = publisher.publish(1, tensors(1))
    second = publisher.publish(2, tensors(2))
    with pytest.raises(WeightsGone, match="version 1"):
        reader.receive(first)
    assert reader.latest() == second


def test_without_a_publisher_there_is_no_round(open_one: Opener) -> None:
    wanted = open_one("publisher").publish(1, tensors(1))
    silent = open_one("reader", 0.3)
    silent._coordination.clear()
    with pytest.raises(WeightsGone):
        silent.receive(wanted)


def test_a_publisher_that_is_away_is_said_in_time(redis_url: str, run_name: str, open_one: Opener) -> None:
    publisher = channel_of(redis_url, run_name, "publisher")
    wanted = publisher.publish(1, tensors(1))
    publisher.close()
    with pytest.raises(WeightsUnavailable, match=r"weights\.timeout_s"):
        open_one("reader", 0.3).receive(wanted)


def test_a_request_that_is_not_repeated_is_void(redis_url: str, run_name: str) -> None:
    coordination = Coordination(redis_url, run_name, BufferConfig())
    coordination.request(Request("dead", "v", 1))
    assert [request.reader for request in coordination.requests()] == ["dead"]
    until(lambda: not coordination.requests())
    coordination.close()


@pytest.mark.parametrize("change", ["value", "swap", "name", "dtype"])
def test_a_digest_sees_every_change(change: str) -> None:
    before = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    after = {
        "value": {"a": torch.tensor([1.0, 2.0000002]), "b": torch.tensor([3.0])},
        "swap": {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([3.0])},
        "name": {"a": torch.tensor([1.0, 2.0]), "c": torch.tensor([3.0])},
        "dtype": {"a": torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "b": torch.tensor([3.0])},
    }[change]
    assert digest(before.items()) != digest(after.items())
    assert digest(before.items()) == digest(reversed(before.items()))


def test_a_check_in_that_lacks_a_rank_ends_in_time() -> None:
    with pytest.raises(TimeoutError, match="not all 2 ranks"):
        check_in("127.0.0.1", 0, 0, 2, 0.2)


class GlooEngine(ScriptedEngine):
    """Receives over gloo; the first transfer is lost on its way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lost = 1
        self.received: dict[str, torch.Tensor] = {}

    async def receive_weights(self, incoming: Incoming) -> None:
        if self.lost:
            self.lost -= 1
            raise TransferLost("a member was missing")
        self.received = await asyncio.to_thread(Receiver().load, incoming)


@pytest.mark.parametrize("update", ["in_flight", "at_step", "at_episode"])
async def test_a_follower_joins_and_asks_again_when_a_transfer_is_lost(
    open_one: Opener, tmp_path: Path, update: str
) -> None:
    publisher, engine = open_one("publisher", 4.0), GlooEngine(tokenizer_folder(tmp_path))
    config = WeightsConfig.model_validate({"update": update, "timeout_s": TIMEOUT_S})
    follower = WeightFollower(open_one("actor", 4.0), engine, config)
    await asyncio.to_thread(publisher.publish, 1, tensors(1))
    await follower.first()
    assert same(engine.received, tensors(1))


async def test_an_engine_without_transfers_says_so(open_one: Opener, tmp_path: Path) -> None:
    publisher = open_one("publisher", 4.0)
    follower = WeightFollower(
        open_one("actor", 4.0), ScriptedEngine(tokenizer_folder(tmp_path)), WeightsConfig(timeout_s=4.0)
    )
    await asyncio.to_thread(publisher.publish, 1, tensors(1))
    with pytest.raises(EngineFailed, match=r"weights\.channel=nccl"):
        await follower.first()


@pytest.mark.parametrize("transport", ["nccl", "gloo"])
def test_the_configured_channel_needs_a_redis_and_forgets_earlier_publishers(
    open_one: Opener, redis_url: str, run_name: str, tmp_path: Path, transport: str
) -> None:
    config = WeightsConfig.model_validate({"channel": transport})
    with pytest.raises(WeightsError, match="Redis"):
        open_channel(config, run_name, tmp_path)
    open_one("publisher").publish(1, tensors(1))
    reader = open_channel(config, run_name, tmp_path, redis_url=redis_url, reader="actor")
    assert reader.latest() is not None
    publisher = open_channel(config, run_name, tmp_path, redis_url=redis_url)
    assert publisher.latest() is not None
    publisher.open_run()
    assert publisher.latest() is None
    assert reader.latest() is None
    reader.close()
    publisher.close()
