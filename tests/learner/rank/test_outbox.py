"""What a rank sends through Ray's channel, version after version."""

import subprocess
import sys

import pytest
import torch

from learner.rank.outbox import Outbox
from services.weights import WeightsGone, ray_store
from services.weights.payload import Layout, fill
from services.weights.ray_store import RayChannel

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def channel(run_name):
    channel = RayChannel(run_name, 60.0)
    yield channel
    channel.close_run()


def tensors(version):
    return {"a": torch.full((1000,), float(version))}


def snapshot(outbox, version):
    layout = Layout.of(tensors(version))
    file = outbox.room(layout.nbytes)
    fill(layout.write_header(file.payload), tensors(version).items())
    return file


def test_a_publisher_writes_to_the_memory_of_versions_that_nobody_reads(channel):
    """Two files for all versions; a reader that is late keeps its own."""
    outbox, files, fetched = Outbox(channel), [], {}
    for version in range(1, 7):
        files.append(snapshot(outbox, version))
        outbox.send(version, files[-1])
        assert outbox.announced(60.0)
        latest = channel.latest()
        assert latest.version == version
        values = channel.fetch(latest)["a"]
        assert bool((values == version).all())
        if version == 3:
            fetched[version] = values
        del values
    assert files[0] is files[2]
    assert files[1] is files[3]
    assert files[4] is not files[2]
    assert bool((fetched[3] == 3.0).all())


def test_a_version_that_is_written_over_is_gone(channel):
    outbox = Outbox(channel)
    outbox.send(1, snapshot(outbox, 1))
    assert outbox.announced(60.0)
    first = channel.latest()
    outbox.send(2, snapshot(outbox, 2))
    assert float(channel.fetch(first)["a"][0]) == 1.0
    snapshot(outbox, 3)
    with pytest.raises(WeightsGone, match="version 1"):
        channel.fetch(first)


def test_a_failed_transfer_is_told_by_the_next_call_and_the_version_before_stays(channel, monkeypatch):
    outbox = Outbox(channel)
    outbox.send(1, snapshot(outbox, 1))
    assert outbox.announced(60.0)
    second = snapshot(outbox, 2)
    with monkeypatch.context() as patch:
        patch.setattr(ray_store, "checksum", lambda payload: 1 / 0)
        outbox.send(2, second)
        with pytest.raises(ZeroDivisionError):
            outbox.announced(60.0)
    assert outbox.announced(0.0)
    latest = channel.latest()
    assert latest.version == 1
    assert snapshot(outbox, 3) is second


ENDS_MEANWHILE = """
import threading
from learner.rank.outbox import Outbox

class Endless:
    def pool(self): ...

    def send(self, version, snapshot, digest):
        begun.set()
        threading.Event().wait()

class Snapshot:
    def unlock(self): ...

begun = threading.Event()
Outbox(Endless()).send(1, Snapshot())
assert begun.wait(60)
print("ends")
"""


def test_a_rank_that_ends_does_not_wait_for_a_transfer():
    """Its Redis died with the run: retries would keep the process for a minute."""
    done = subprocess.run([sys.executable, "-c", ENDS_MEANWHILE], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr
