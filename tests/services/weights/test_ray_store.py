from __future__ import annotations

import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from services.buffer import Buffer
from services.buffer.owner import Owner
from services.config.tree import BufferConfig, WeightsConfig
from services.errors import RunTaken
from services.weights import WeightsCorrupt, WeightsGone, WeightsUnavailable, WeightVersion, open_channel, ray_store
from services.weights.fence import Fence
from services.weights.ray_store import NAMESPACE, RayChannel
from tests.waiting import until

SIZE = 300_000  # more than Ray sends inline


pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def run() -> str:
    """One run for all tests: its holder is a process, and slow to start."""
    return "test-weights"


@pytest.fixture
def channel(run: str) -> RayChannel:
    return RayChannel(run, timeout_s=60.0)


def tensors(version: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((SIZE,), float(version)), "b": torch.full((3,), version, dtype=torch.bfloat16)}


@ray.remote(num_cpus=0)
class Learner:
    def publish(self, run: str, version: int) -> WeightVersion:
        return RayChannel(run, timeout_s=60.0).publish(version, tensors(version))


@ray.remote(num_cpus=0)
def read_sum(run: str) -> tuple[int, float]:
    channel = RayChannel(run, timeout_s=60.0)
    latest = channel.latest()
    assert latest is not None
    return latest.version, float(channel.fetch(latest)["a"].sum())


def test_a_version_arrives_as_it_was_published(channel: RayChannel) -> None:
    published = channel.publish(3, tensors(3))
    assert channel.latest() == published
    fetched = channel.fetch(published)
    assert {name: (t.dtype, t.tolist()) for name, t in fetched.items()} == {
        name: (t.dtype, t.tolist()) for name, t in tensors(3).items()
    }


def test_a_late_joiner_gets_the_newest(channel: RayChannel, run: str) -> None:
    for version in (1, 2):
        channel.publish(version, tensors(version))
    assert ray.get(read_sum.remote(run), timeout=60) == (2, 2.0 * SIZE)


def test_weights_outlive_the_learner(channel: RayChannel, run: str) -> None:
    learner: Any = Learner.remote()
    published = ray.get(learner.publish.remote(run, 7), timeout=60)
    ray.kill(learner)
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(learner.publish.remote(run, 8), timeout=60)
    assert channel.latest() == published
    assert float(channel.fetch(published)["a"][0]) == 7.0


def test_the_last_two_publications_are_kept(channel: RayChannel) -> None:
    first, second, third = (channel.publish(version, tensors(version)) for version in (1, 2, 3))
    assert channel.latest() == third
    assert float(channel.fetch(second)["a"][0]) == 2.0
    with pytest.raises(WeightsGone, match="version 1"):
        channel.fetch(first)
    assert channel.publish(2, tensors(2)) == second
    assert channel.latest() == second


def test_tensors_stay_readable_after_their_version_has_gone(channel: RayChannel) -> None:
    fetched = channel.fetch(channel.publish(1, tensors(1)))
    for version in range(2, 6):
        channel.publish(version, tensors(version))
    assert bool((fetched["a"] == 1.0).all())


def test_another_checksum_is_refused(channel: RayChannel) -> None:
    published = channel.publish(1, tensors(1))
    wrong = WeightVersion(published.version, published.nbytes, "0" * 32, published.locator)
    with pytest.raises(WeightsCorrupt, match="version 1"):
        channel.fetch(wrong)


def test_between_nodes_a_version_goes_in_chunks(channel: RayChannel, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process claims to be on another node than the holder: as the publisher, and as a reader."""
    elsewhere = RayChannel(run, timeout_s=60.0)
    monkeypatch.setattr(ray_store, "CHUNK_BYTES", SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(ray_store, "_own_node", lambda: "elsewhere")
        published = elsewhere.publish(5, tensors(5))
        assert elsewhere.latest() == published
        far = elsewhere.bring(published)
        assert far.file is not None
        wrong = WeightVersion(5, published.nbytes, "0" * 32, published.locator)
        with pytest.raises(WeightsCorrupt, match="version 5"):
            elsewhere.bring(wrong)
    near = channel.bring(published)
    assert near.file is None
    for delivery in (far, near):
        assert {name: (t.dtype, t.tolist()) for name, t in delivery.tensors().items()} == {
            name: (t.dtype, t.tolist()) for name, t in tensors(5).items()
        }


def test_a_killed_holder_comes_back_empty(channel: RayChannel, run: str) -> None:
    published = channel.publish(1, tensors(1))
    ray.kill(ray.get_actor(f"weights-{run}", namespace=NAMESPACE), no_restart=False)
    until(lambda: channel.latest() is None)  # a call may still reach the one that is being killed
    with pytest.raises(WeightsGone, match="version 1"):
        channel.fetch(published)
    republished = channel.publish(1, tensors(1))
    assert channel.fetch(republished)["a"].shape == (SIZE,)


def test_the_time_limit_holds(channel: RayChannel, run: str) -> None:
    channel.publish(1, tensors(1))
    holder = ray.get_actor(f"weights-{run}", namespace=NAMESPACE)
    busy = holder.__ray_call__.remote(lambda _: time.sleep(2.0))  # one call at a time: nobody is answered meanwhile
    with pytest.raises(WeightsUnavailable, match="timeout_s"):
        RayChannel(run, timeout_s=0.1).latest()
    ray.get(busy, timeout=60.0)


def test_runs_do_not_see_each_other_and_end_apart(channel: RayChannel, tmp_path: Path) -> None:
    other = open_channel(WeightsConfig(), "test-weights-2", tmp_path)
    assert isinstance(other, RayChannel)
    channel.publish(1, tensors(1))
    assert other.latest() is None
    other.publish(2, tensors(2))
    other.close_run()
    other.close_run()
    latest = channel.latest()
    assert latest is not None
    assert latest.version == 1


def test_a_publisher_whose_run_another_process_owns_announces_nothing(redis_url: str, run_name: str) -> None:
    """Redis says so; where Redis was asked just before, the holder does."""

    class Asked(Fence):
        """As if the name was lost between the question and the announcement."""

        def check(self) -> None:
            pass

    with closing(Buffer.connect(redis_url, run_name, BufferConfig())) as buffer:

        def take(kind: type[Fence]) -> Fence:
            token = buffer.take(buffer.owner(), uuid.uuid4().hex, "lineage", "{}")
            assert token is not None
            return kind(redis_url, run_name, BufferConfig(), Owner(token, "lineage", "{}"))

        first, careless, second = (RayChannel(run_name, 60.0, take(kind)) for kind in (Fence, Asked, Fence))
        try:
            second.open_run()
            assert second.latest() is None
            mine = second.publish(3, tensors(3))
            for late in (first, careless):
                for announce in (lambda late=late: late.publish(4, tensors(4)), late.announce_initial, late.open_run):
                    with pytest.raises(RunTaken, match=f"run {run_name} is in use"):
                        announce()
                    assert second.latest() == mine
            second.open_run()  # its reply was lost
            assert second.latest() == mine
            second.announce_initial()
            newest = second.latest()
            assert newest is not None
            assert newest.initial
            with pytest.raises(WeightsGone):
                second.fetch(newest)
        finally:
            second.close_run()
