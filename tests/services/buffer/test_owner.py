"""One process at a time owns a run's name in a Redis; a process that has lost it can change nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from redis import Redis

from services.buffer import Buffer
from services.buffer import owner as owner_module
from services.buffer.keys import KINDS, Keys
from services.buffer.owner import RECORD, Owner, Ownership, Record, in_use, take
from services.config.tree import BufferConfig
from services.errors import BufferDamaged, RunTaken
from services.schemas import Task, Ticket, Trajectory
from tests.waiting import until

LONG_S = 600.0
SHORT_S = 2.0
MIDDLE_S = 4.0
"""Long enough for a heartbeat on a busy machine."""

CHILD = """
import sys
from services.buffer import Buffer
from services.buffer.owner import Ownership, take
from services.config.tree import BufferConfig
url, run, lease_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
buffer = Buffer.connect(url, run, BufferConfig())
buffer.own(take(buffer, run, "lineage", lease_s))
Ownership(buffer, lease_s)
print("owned", flush=True)
for line in sys.stdin:
    try:
        buffer.set_state(line.strip())
        print("written", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


def ticket(group: int) -> Ticket:
    return Ticket(group=group, member=0, group_size=1, task=Task(env="e", split="s", index=0), seed=0)


@pytest.fixture
def connect(redis_url: str, run_name: str) -> Iterator[Callable[[], Buffer]]:
    with ExitStack() as opened:

        def connect() -> Buffer:
            buffer = Buffer.connect(redis_url, run_name, BufferConfig(), max_attempts=2)
            opened.callback(buffer.close)
            return buffer

        yield connect


@pytest.fixture
def child(redis_url: str, run_name: str) -> Iterator[Callable[[float], subprocess.Popen[str]]]:
    """Another process that has the run."""
    with ExitStack() as opened:

        def start(lease_s: float) -> subprocess.Popen[str]:
            arguments = [sys.executable, "-c", CHILD, redis_url, run_name, str(lease_s)]
            process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            opened.callback(process.wait)
            opened.callback(process.kill)
            assert said(process) == "owned"
            return process

        yield start


def said(process: subprocess.Popen[str], line: str | None = None) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if line is not None:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


def own(buffer: Buffer, run: str, lineage: str = "lineage", lease_s: float = LONG_S) -> Owner:
    owner = take(buffer, run, lineage, lease_s)
    buffer.own(owner)
    return owner


def elsewhere(lease_s: float) -> str:
    """The record of a process that cannot be looked at from here."""
    return RECORD.dump_json(dataclasses.replace(Record.here(lease_s), host="far-away", boot="another")).decode()


def test_the_error_of_a_second_process_names_the_owner(connect, child, run_name):
    process = child(LONG_S)
    with pytest.raises(
        RunTaken, match=rf"^run {run_name} is in use by \S+ \(process {process.pid}\) since 20"
    ) as caught:
        take(connect(), run_name, "lineage", LONG_S)
    assert "\n" not in str(caught.value)
    assert said(process, "undisturbed") == "written"


def test_a_killed_owner_on_this_machine_is_replaced_at_once(connect, child, run_name):
    process = child(LONG_S)
    process.kill()  # not waited for: a zombie is dead, too
    until(lambda: connect().owner().record.state() in ("X", "Z"))
    own(connect(), run_name)


def test_a_pid_that_is_used_again_is_not_the_owner(connect, run_name):
    buffer = connect()
    before = dataclasses.replace(Record.here(LONG_S), started=1)
    assert buffer.take(None, "x", "lineage", RECORD.dump_json(before).decode())
    own(buffer, run_name)


def test_an_owner_elsewhere_that_beats_is_alive(connect, run_name):
    far = connect()
    far.own(Owner(far.take(None, "x", "lineage", elsewhere(MIDDLE_S)), "lineage", elsewhere(MIDDLE_S)))
    kept = Ownership(far, MIDDLE_S)
    told: list[str] = []
    with pytest.raises(RunTaken, match="is in use by far-away"):
        take(connect(), run_name, "lineage", SHORT_S, waiting=told.append)
    assert len(told) == 1
    kept.release()
    own(connect(), run_name)  # at once: it was released


def test_an_owner_elsewhere_that_is_silent_for_its_lease_is_replaced(connect, run_name):
    connect().take(None, "x", "lineage", elsewhere(SHORT_S))
    began = time.monotonic()
    own(connect(), run_name)
    assert time.monotonic() - began >= SHORT_S


def test_a_record_that_cannot_be_read_is_watched(connect, run_name):
    connect().take(None, "x", "lineage", "no record")
    own(connect(), run_name, lease_s=SHORT_S)


@pytest.mark.parametrize(
    "strange",
    [
        {"since": 1e300},
        {"since": math.nan},
        {"lease_s": 1e12},
        {"lease_s": math.nan},
        {"host": "a\nb"},
        {"pid": 10**30},
    ],
)
def test_a_record_of_impossible_facts_is_watched_for_our_own_lease(connect, run_name, strange):
    """Else it were a traceback, a wait without an end, or a line that is several."""
    record = dataclasses.asdict(Record.here(SHORT_S)) | {"boot": "another"} | strange
    connect().take(None, "x", "lineage", json.dumps(record))
    buffer = connect()
    assert "\n" not in in_use(run_name, buffer.owner().record)
    own(buffer, run_name, lease_s=0.5)


def test_an_owner_that_proc_hides_is_not_dead(monkeypatch, tmp_path):
    """As another user's processes are under `hidepid`."""
    (tmp_path / "self" / "ns").mkdir(parents=True)
    (tmp_path / "sys" / "kernel" / "random").mkdir(parents=True)
    (tmp_path / "sys" / "kernel" / "random" / "boot_id").write_text("boot")
    (tmp_path / "self" / "ns" / "pid").symlink_to("pid:[1]")
    record = dataclasses.replace(Record.here(LONG_S), boot="boot", namespace="pid:[1]")
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    monkeypatch.setattr(owner_module, "_PROC", tmp_path)
    assert record.state() is None
    assert dataclasses.replace(record, pid=ended.pid).state() == "X"


def test_a_frozen_owner_is_replaced_after_its_lease_and_cannot_write_again(connect, child, run_name):
    process = child(SHORT_S)
    os.kill(process.pid, signal.SIGSTOP)
    until(lambda: connect().owner().record.state() == "T")
    buffer = connect()
    own(buffer, run_name)
    buffer.set_state("mine")
    os.kill(process.pid, signal.SIGCONT)
    assert said(process, "stopping") == "RunTaken"
    assert buffer.state() == "mine"


def test_of_many_that_want_a_free_name_one_gets_it(connect, run_name):
    buffer = connect()
    seen = buffer.owner()
    tokens = [buffer.take(seen, unique, "lineage", elsewhere(LONG_S)) for unique in "abc"]
    assert [token is not None for token in tokens] == [True, False, False]
    assert buffer.take(seen, "a", "lineage", elsewhere(LONG_S)) == tokens[0]  # repeated after a lost answer


def test_a_process_that_lost_the_run_can_change_nothing(connect, run_name):
    lost, actor = connect(), connect()
    actor.own(own(lost, run_name))
    lost.issue([ticket(0), ticket(1), ticket(2)])
    first, second = actor.lease("a", 2, LONG_S)
    actor.store(Trajectory(first, ()))
    kept = Ownership(lost, SHORT_S)
    mine = connect()
    mine.own(Owner(mine.take(mine.owner(), "b", "lineage", elsewhere(LONG_S)), "lineage", elsewhere(LONG_S)))
    # What was leased by the actors of the other is free, without an attempt counted; what was stored stays.
    assert (mine.stats().queued, mine.stats().leased, mine.complete("train")) == (2, 0, [0])
    until(lambda: kept.lost)
    before = mine.contents()
    calls: list[Callable[[], object]] = [
        kept.check,
        lost.beat,
        lambda: lost.issue([ticket(3)]),
        lambda: lost.read("train", 0),
        lambda: lost.remove("train", [0]),
        lambda: lost.cancel("train", 1, "why"),
        lambda: lost.set_state("stopping"),
        lambda: lost.set_manifest("{}"),
        lambda: lost.append_metrics({"step": 1}),
        lambda: actor.lease("a", 1, LONG_S),
        lambda: actor.store(Trajectory(second, ())),
        lambda: actor.renew("a", [second.id], LONG_S),
        lambda: actor.release("a", [second.id]),
        lambda: actor.fail("a", second.id, "why"),
        lambda: actor.heartbeat("a", {}, LONG_S),
        actor.expire,
    ]
    for call in calls:
        with pytest.raises(RunTaken, match="is in use by far-away"):
            call()
    kept.release()
    assert mine.contents() == before
    assert (mine.state(), mine.actors(), mine.metrics()) == ("", {}, [])
    assert not mine.owner().released


def test_another_lineage_finds_nothing_of_the_one_before(connect, redis_url, run_name):
    buffer = connect()
    own(buffer, run_name, "one")
    buffer.release_owner()
    with Redis.from_url(redis_url) as client:
        keys = Keys(run_name)
        for name in set(KINDS) - {"owner"}:
            client.set(keys[name], "whatever it is, wrong types too")
        own(connect(), run_name, "two")
        assert [name for name in KINDS if client.exists(keys[name])] == ["owner"]


def test_an_owner_that_redis_has_lost_is_put_back(connect, redis_url, run_name):
    buffer, other = connect(), connect()
    owner = own(buffer, run_name)
    other.own(owner)
    with Redis.from_url(redis_url) as client:
        client.delete(Keys(run_name)["owner"])
    assert other.issue([ticket(0)]) == 1
    assert buffer.owner().token == owner.token


def test_what_goes_wrong_after_the_owner_is_put_back_is_one_line(connect, redis_url, run_name):
    buffer, keys = connect(), Keys(run_name)
    own(buffer, run_name)
    with Redis.from_url(redis_url) as client:
        client.hset(keys["owner"], "token", "5-earlier")  # of the same lineage: its data stay
        client.set(keys["sizes"], "foreign")
        with pytest.raises(BufferDamaged, match="sizes is a string"):
            buffer.issue([ticket(0)])


def test_older_data_of_another_lineage_is_not_taken_up(connect, redis_url, run_name):
    """Redis dies right after a new start has taken the name, and comes back with what it had before."""
    earlier, buffer = connect(), connect()
    own(earlier, run_name, "earlier")
    earlier.issue([ticket(0)])
    earlier.store(Trajectory(ticket(0), ()))
    earlier.release_owner()
    with Redis.from_url(redis_url) as client:
        saved = {name: client.dump(Keys(run_name)[name]) for name in KINDS}
        own(buffer, run_name, "new")
        for name, value in saved.items():
            client.delete(Keys(run_name)[name])
            if value is not None:
                client.restore(Keys(run_name)[name], 0, value)
    with pytest.raises(KeyError):
        buffer.read("train", 0)
    assert buffer.known("train") == set()
    with pytest.raises(RunTaken):
        earlier.issue([ticket(0)])


def test_a_redis_that_was_away_is_no_silence_of_the_owner(connect, run_name, monkeypatch):
    """Time spent waiting for Redis does not count as time in which the owner was watched."""
    far, buffer = connect(), connect()
    far.own(Owner(far.take(None, "x", "lineage", elsewhere(MIDDLE_S)), "lineage", elsewhere(MIDDLE_S)))
    ask, answers = buffer.owner, []

    def owner():
        if len(answers) == 2:
            time.sleep(1.2 * MIDDLE_S)  # Redis is away, for the owner too
        answers.append(ask())
        if len(answers) == 4:
            far.beat()
        return answers[-1]

    monkeypatch.setattr(buffer, "owner", owner)
    with pytest.raises(RunTaken):
        take(buffer, run_name, "lineage", SHORT_S)


def test_in_a_redis_of_its_own_a_run_waits_for_nobody(connect, child, run_name):
    """A copied folder holds the record of the original, which may run."""
    child(LONG_S)
    take(connect(), run_name, "lineage", LONG_S, alone=True)
