from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from redis import Redis

from services.buffer import Buffer, Stored, StreamStats
from services.codec import CodecError
from services.config.tree import BufferConfig
from services.schemas import Step, Task, Ticket, Trajectory, VersionSpan
from tests.waiting import until

TASK = Task(env="e", split="train", index=0)
LONG_S = 60.0
CONFIG = BufferConfig(timeout_s=5.0, reconnect_s=5.0)


def ticket(group: int, member: int, stream: str = "train", size: int = 2) -> Ticket:
    return Ticket(stream=stream, group=group, member=member, group_size=size, task=TASK, seed=group)


def group(number: int, stream: str = "train", size: int = 2) -> list[Ticket]:
    return [ticket(number, member, stream, size) for member in range(size)]


def play(wanted: Ticket, actor: str = "a", kilobytes: int = 0) -> Trajectory:
    noise = np.random.default_rng(0).integers(0, 2**31, 256 * kilobytes, dtype=np.int32)
    step = Step(
        prompt_ids=noise,
        response_ids=np.array([1], dtype=np.int32),
        logprobs=np.array([-1.0], dtype=np.float32),
        versions=(VersionSpan(0, 1),),
        anchor="s",
        observation="o",
        prompt="p",
        response="r",
        action="x",
        reward=0.0,
        valid=True,
    )
    return Trajectory(wanted, (step,), actor=actor)


def expire_all(buffer: Buffer, count: int) -> None:
    handed_back = 0

    def expired() -> bool:
        nonlocal handed_back
        handed_back += buffer.expire()
        return handed_back == count

    until(expired)


@pytest.fixture
def buffer(redis_url: str, run_name: str) -> Iterator[Buffer]:
    buffer = Buffer.connect(redis_url, run_name, CONFIG, max_attempts=2)
    yield buffer
    buffer.close()


@pytest.fixture
def small(redis_url: str, run_name: str) -> Iterator[Buffer]:
    """A buffer that is full after two trajectories of 600 KiB."""
    buffer = Buffer.connect(redis_url, run_name, BufferConfig(max_mib=1), max_attempts=2)
    yield buffer
    buffer.close()


# order


def test_tickets_come_evaluation_first_then_by_stream_group_member(buffer: Buffer) -> None:
    streams = ["train", "eval-2", "eval-10", "eval", "zz"]
    tickets = [t for stream in streams for number in (10, 9, 0) for t in reversed(group(number, stream))]
    assert buffer.issue(tickets) == len(tickets)
    expected = sorted(tickets, key=lambda t: (t.stream == "train", t.stream, t.group, t.member))
    assert buffer.lease("a", 7, LONG_S) + buffer.lease("b", 100, LONG_S) == expected


def test_released_tickets_go_to_the_front(buffer: Buffer) -> None:
    buffer.issue(group(0) + group(1))
    first, second = buffer.lease("a", 2, LONG_S)
    buffer.release("a", [first.id, second.id])
    assert buffer.lease("b", 2, LONG_S) == [first, second]
    assert buffer.cancelled("train") == {}


def test_release_counts_no_attempt_and_needs_the_holder(buffer: Buffer) -> None:
    buffer.issue(group(0))
    for _ in range(5):
        (leased, *_) = buffer.lease("a", 2, LONG_S)
        buffer.release("other", [leased.id])
        assert buffer.lease("b", 2, LONG_S) == []
        buffer.release("a", [t.id for t in group(0)])
    assert buffer.stats().queued == 2


# issuing


def test_issuing_again_is_a_no_op_in_every_state(buffer: Buffer) -> None:
    tickets = group(0, size=4)
    assert buffer.issue(tickets[:2]) == 2
    assert buffer.issue(tickets) == 2
    buffer.lease("a", 1, LONG_S)
    buffer.store(play(tickets[1]))
    assert buffer.issue(tickets) == 0
    assert (buffer.stats().queued, buffer.stats().leased) == (2, 1)
    for t in tickets:
        buffer.store(play(t))
    assert buffer.issue(tickets) == 0
    buffer.issue(group(1))
    buffer.cancel("train", 1, "why")
    assert buffer.issue(group(1)) == 0
    assert buffer.stats().queued == 0


def test_many_tickets_at_once(buffer: Buffer) -> None:
    tickets = [t for number in range(300) for t in group(number)]
    assert buffer.issue(tickets) == 600
    assert buffer.known("train") == set(range(300))
    assert buffer.lease("a", 1000, LONG_S) == tickets
    buffer.remove("train", range(300))
    assert buffer.known("train") == set()


def test_a_known_group_keeps_its_size(buffer: Buffer) -> None:
    buffer.issue(group(0))
    with pytest.raises(ValueError, match="train/0 is known with 2 members"):
        buffer.issue([*group(1), *group(0, size=3)])
    assert buffer.known("train") == {0}


@pytest.mark.parametrize(
    "wrong", [ticket(0, 2), ticket(0, -1), ticket(-1, 0), ticket(10**12, 0), ticket(0, 0, "a b"), ticket(0, 0, "")]
)
def test_impossible_tickets_are_refused(buffer: Buffer, wrong: Ticket) -> None:
    with pytest.raises(ValueError, match=r"out of range|outside|not a stream"):
        buffer.issue([wrong])


def test_reissue_after_remove_is_a_fresh_group(buffer: Buffer) -> None:
    buffer.issue(group(0))
    (held, _) = buffer.lease("a", 2, LONG_S)
    buffer.fail("a", held.id, "once")
    buffer.store(play(held, "old"))
    buffer.remove("train", [0])
    assert buffer.stats().trajectory_bytes == 0
    assert buffer.store(play(held)) is Stored.UNKNOWN
    assert buffer.issue(group(0)) == 2
    assert buffer.renew("a", [held.id], LONG_S) == [held.id]
    assert buffer.lease("b", 2, LONG_S) == group(0)
    assert not buffer.fail("b", held.id, "once, afresh")
    assert [buffer.store(play(t, "new")) for t in group(0)] == [Stored.STORED, Stored.COMPLETED]
    assert [t.actor for t in buffer.read("train", 0)] == ["new", "new"]


# storing


def test_a_full_group_becomes_visible_in_member_order(buffer: Buffer) -> None:
    buffer.issue(group(0, size=3) + group(1))
    leased = buffer.lease("a", 3, LONG_S)
    outcomes = []
    for t in reversed(leased):
        assert buffer.complete("train") == []
        outcomes.append(buffer.store(play(t)))
    assert outcomes == [Stored.STORED, Stored.STORED, Stored.COMPLETED]
    assert buffer.complete("train") == [0]
    assert [t.ticket.member for t in buffer.read("train", 0)] == [0, 1, 2]
    assert buffer.known("train") == {0, 1}


def test_complete_groups_are_ascending_and_by_stream(buffer: Buffer) -> None:
    for number in (11, 2, 1):
        for stream in ("train", "eval"):
            buffer.issue(group(number, stream, size=1))
            buffer.store(play(ticket(number, 0, stream, 1)))
    assert buffer.complete("train") == buffer.complete("eval") == [1, 2, 11]
    assert buffer.complete("eva") == buffer.complete("eval-1") == []


def test_reading_an_incomplete_group_is_an_error(buffer: Buffer) -> None:
    buffer.issue(group(0))
    buffer.store(play(ticket(0, 0)))
    for number in (0, 1):
        with pytest.raises(KeyError, match=f"train/{number}"):
            buffer.read("train", number)


def test_first_write_wins(buffer: Buffer) -> None:
    buffer.issue(group(0))
    assert buffer.store(play(ticket(0, 0), "first")) is Stored.STORED
    before = buffer.stats()
    assert buffer.store(play(ticket(0, 0), "second")) is Stored.DUPLICATE
    assert buffer.stats() == before
    buffer.store(play(ticket(0, 1), "first"))
    assert buffer.store(play(ticket(0, 1), "second")) is Stored.DUPLICATE
    assert [t.actor for t in buffer.read("train", 0)] == ["first", "first"]


def test_one_of_many_writers_wins(buffer: Buffer) -> None:
    buffer.issue(group(0, size=4))
    attempts = [play(t, f"w{writer}") for writer in range(4) for t in group(0, size=4)]
    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(buffer.store, attempts))
    counts = {kind: outcomes.count(kind) for kind in Stored}
    assert counts == {Stored.STORED: 3, Stored.COMPLETED: 1, Stored.DUPLICATE: 12, Stored.UNKNOWN: 0}


def test_a_late_trajectory_is_kept_and_ends_the_replay(buffer: Buffer) -> None:
    buffer.issue(group(0))
    buffer.lease("slow", 1, 0.0)
    expire_all(buffer, 1)
    assert buffer.lease("quick", 1, LONG_S) == [ticket(0, 0)]
    assert buffer.store(play(ticket(0, 0), "slow")) is Stored.STORED
    assert buffer.renew("quick", [ticket(0, 0).id], LONG_S) == [ticket(0, 0).id]
    assert buffer.stats().leased == 0


def test_a_late_trajectory_takes_its_ticket_out_of_the_queue(buffer: Buffer) -> None:
    buffer.issue(group(0))
    buffer.lease("slow", 1, 0.0)
    expire_all(buffer, 1)
    assert buffer.store(play(ticket(0, 0))) is Stored.STORED
    assert buffer.lease("quick", 2, LONG_S) == [ticket(0, 1)]


def test_a_trajectory_without_a_group_is_dropped(buffer: Buffer) -> None:
    buffer.issue([ticket(1, 0)])
    buffer.cancel("train", 1, "why")
    buffer.issue([ticket(2, 0, size=3)])
    for stray in (ticket(0, 0), ticket(1, 0), ticket(2, 1, size=3), ticket(2, 0, "eval", 3)):
        assert buffer.store(play(stray)) is Stored.UNKNOWN
    assert buffer.stats().trajectory_bytes == 0


def test_a_trajectory_off_schema_is_refused(buffer: Buffer) -> None:
    with pytest.raises(CodecError):
        buffer.store(Trajectory(ticket(0, 0), (), facts={"x": object()}))


# leases


def test_an_expired_lease_goes_to_another(buffer: Buffer) -> None:
    buffer.issue(group(0))
    lost = buffer.lease("a", 1, 0.0)
    kept = buffer.lease("a", 1, LONG_S)
    expire_all(buffer, 1)
    assert buffer.lease("b", 2, LONG_S) == lost
    assert buffer.renew("a", [lost[0].id, kept[0].id], LONG_S) == [lost[0].id]


def test_renewal_moves_the_end_of_the_lease(buffer: Buffer) -> None:
    buffer.issue(group(0))
    buffer.lease("a", 1, LONG_S)
    assert buffer.renew("a", [ticket(0, 0).id], 0.0) == []
    expire_all(buffer, 1)
    buffer.lease("a", 1, 0.0)
    assert buffer.renew("a", [ticket(0, 0).id], LONG_S) == []
    assert buffer.expire() == 0


def test_attempts_end_a_group(buffer: Buffer) -> None:
    buffer.issue(group(0) + group(1))
    buffer.store(play(ticket(0, 0)))
    assert buffer.lease("a", 1, LONG_S) == [ticket(0, 1)]
    assert not buffer.fail("a", ticket(0, 1).id, "first")
    assert buffer.lease("a", 1, LONG_S) == [ticket(0, 1)]
    assert buffer.fail("a", ticket(0, 1).id, "boom")
    assert buffer.fail("a", ticket(0, 1).id, "boom, repeated")
    assert buffer.cancelled("train") == {0: "train/0/1 failed 2 times, last: boom"}
    assert buffer.stats().trajectory_bytes == 0
    assert buffer.lease("a", 9, LONG_S) == group(1)


def test_only_the_holder_fails_a_ticket(buffer: Buffer) -> None:
    buffer.issue(group(0))
    buffer.lease("a", 1, LONG_S)
    for _ in range(3):
        assert not buffer.fail("b", ticket(0, 0).id, "not mine")
        assert not buffer.fail("a", ticket(0, 1).id, "not leased")
        assert not buffer.fail("a", ticket(7, 0).id, "not known")
    assert (buffer.stats().queued, buffer.stats().leased) == (1, 1)


def test_expiry_counts_attempts_and_cancels_once(buffer: Buffer) -> None:
    buffer.issue(group(0))
    for _ in range(2):
        assert buffer.lease("a", 2, 0.0) == group(0)
        expire_all(buffer, 2)
    assert buffer.cancelled("train") == {0: "train/0/0 failed 2 times, last: lease of a expired"}
    assert (buffer.stats().queued, buffer.stats().leased) == (0, 0)


def test_a_ticket_is_leased_once(buffer: Buffer) -> None:
    tickets = [t for number in range(50) for t in group(number)]
    buffer.issue(tickets)
    with ThreadPoolExecutor(8) as threads:
        leased = list(threads.map(lambda n: buffer.lease(f"a{n}", 7, LONG_S), range(20)))
    assert sorted(t.id for some in leased for t in some) == sorted(t.id for t in tickets)


@pytest.mark.parametrize("wrong", ["", "train", "train/0", "train/0/x", "train/-1/0", "a b/0/0"])
def test_what_is_no_ticket_id_is_refused(buffer: Buffer, wrong: str) -> None:
    with pytest.raises(ValueError, match=r"not a ticket id|not a stream name"):
        buffer.renew("a", [wrong], LONG_S)


def test_empty_requests_ask_nothing(buffer: Buffer) -> None:
    buffer.issue([])
    buffer.issue(group(0))
    assert buffer.lease("a", 0, LONG_S) == []
    assert buffer.renew("a", [], LONG_S) == []
    buffer.release("a", [])
    buffer.remove("train", [])
    assert buffer.known("train") == {0}


# cancelling and removing


def test_cancel_drops_all_but_the_reason(buffer: Buffer) -> None:
    buffer.issue(group(0, size=3))
    buffer.lease("a", 1, LONG_S)
    buffer.store(play(ticket(0, 1, size=3)))
    buffer.cancel("train", 0, "why\ud800" + 1000 * "y")
    buffer.cancel("train", 0, "another reason")
    buffer.cancel("train", 5, "unknown")
    (reason,) = buffer.cancelled("train").values()
    assert reason.startswith("why")
    assert len(reason) <= 500
    stats = buffer.stats()
    assert (stats.queued, stats.leased, stats.trajectory_bytes) == (0, 0, 0)
    assert stats.streams == {"train": StreamStats(cancelled=1)}
    assert buffer.cancelled("eval") == {}


def test_a_complete_group_can_be_cancelled(buffer: Buffer) -> None:
    buffer.issue([ticket(0, 0, size=1)])
    buffer.store(play(ticket(0, 0, size=1)))
    buffer.cancel("train", 0, "stale")
    assert buffer.complete("train") == []
    assert buffer.cancelled("train") == {0: "stale"}


def test_a_removed_run_leaves_no_keys(buffer: Buffer, redis_url: str, run_name: str) -> None:
    for stream in ("train", "eval"):
        buffer.issue(group(0, stream) + group(1, stream) + group(2, stream))
        for t in buffer.lease("a", 3, LONG_S):
            buffer.store(play(t))
        buffer.fail("a", buffer.lease("a", 1, LONG_S)[0].id, "x")
        buffer.cancel(stream, 2, "x")
        buffer.remove(stream, [0, 1, 2, 3])
    with Redis.from_url(redis_url) as client:
        left = {key.decode().rpartition(":")[2]: key for key in client.scan_iter(f"anchorage:{{{run_name}}}:*")}
        assert set(left) == {"bytes", "sequence", "clock"}
        assert client.get(left["bytes"]) == b"0"


def test_runs_do_not_see_each_other(buffer: Buffer, redis_url: str, run_name: str) -> None:
    other = Buffer.connect(redis_url, f"{run_name}-2", CONFIG)
    buffer.issue(group(0))
    buffer.set_state("running")
    assert other.known("train") == set()
    assert other.lease("a", 5, LONG_S) == []
    assert other.state() == ""
    other.close()


# back-pressure


def test_a_full_buffer_begins_no_group_but_finishes_those_begun(small: Buffer) -> None:
    small.issue([t for number in range(4) for t in group(number)])
    first, second, third = small.lease("a", 3, LONG_S)
    for t in (first, second):
        small.store(play(t, kilobytes=600))
    assert small.stats().full
    assert small.lease("b", 9, LONG_S) == [ticket(1, 1)]
    small.release("a", [third.id])
    assert small.lease("b", 9, LONG_S) == [ticket(1, 0)]
    assert small.lease("b", 9, LONG_S) == []
    small.remove("train", [0])
    assert not small.stats().full
    assert small.lease("b", 1, LONG_S) == [ticket(2, 0)]


def test_a_full_buffer_begins_what_the_learner_waits_for(small: Buffer) -> None:
    small.issue(group(1))
    for t in small.lease("a", 2, LONG_S):
        small.store(play(t, kilobytes=600))
    assert small.stats().full
    # Group 0 was lost or too old: the learner takes groups in order. An evaluation may be what it waits for, too.
    small.issue([*group(0), *group(2), *group(7, "eval")])
    assert small.lease("a", 9, LONG_S) == [*group(7, "eval"), *group(0)]


def test_groups_are_issued_whole(buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.buffer.buffer._ISSUE_CHUNK", 3)
    tickets = [t for number in range(3) for t in group(number)] + group(3, size=5)
    with monkeypatch.context() as patch:
        calls = []
        patch.setattr(buffer, "_issue", lambda chunk: calls.append(list(chunk)) or len(chunk))
        assert buffer.issue(tickets) == 11
        assert calls == [group(0), group(1), group(2), group(3, size=5)]
    assert buffer.issue(tickets) == 11
    assert buffer.lease("a", 20, LONG_S) == tickets


def test_a_partly_played_group_finishes_behind_many_that_wait(small: Buffer) -> None:
    small.issue([t for number in range(10) for t in group(number)])
    late = ticket(9, 0)
    small.store(play(late, kilobytes=600))
    small.store(play(ticket(8, 0), kilobytes=600))
    assert small.lease("a", 9, LONG_S) == [ticket(8, 1), ticket(9, 1)]


# waiting


def test_wait_sees_what_happened_before_and_during_it(buffer: Buffer) -> None:
    assert not buffer.wait("train", 0.0)
    buffer.issue(group(0, size=1) + group(1, size=1) + group(2, "eval", 1))
    assert not buffer.wait("train", 0.0)
    buffer.store(play(ticket(0, 0, size=1)))
    assert buffer.wait("train", 0.0)
    assert not buffer.wait("train", 0.0)
    buffer.store(play(ticket(2, 0, "eval", 1)))
    assert not buffer.wait("train", 0.02)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(buffer.wait, "train", 20.0)
        buffer.cancel("train", 1, "why")
        assert waiting.result(20)


def test_removal_neither_wakes_nor_hides_news(buffer: Buffer) -> None:
    for _ in range(3):
        buffer.issue(group(0, size=1))
        buffer.store(play(ticket(0, 0, size=1)))
        assert buffer.wait("train", 5.0)
        buffer.remove("train", [0])
        assert not buffer.wait("train", 0.0)


# run-wide


def test_manifest_and_state(buffer: Buffer) -> None:
    assert buffer.manifest() is None
    assert buffer.state() == ""
    buffer.set_manifest("é")
    buffer.set_state("stopping")
    assert buffer.manifest() == "é"
    assert buffer.state() == "stopping"


def test_heartbeats_expire(buffer: Buffer) -> None:
    buffer.heartbeat("a", {"version": 3, "busy": [1]}, LONG_S)
    buffer.heartbeat("b", {}, 0.0)
    assert buffer.actors() == {"a": {"version": 3, "busy": [1]}}
    buffer.heartbeat("b", {"x": None}, LONG_S)
    buffer.heartbeat("a", {}, 0.0)
    assert buffer.actors() == {"b": {"x": None}}


def test_metrics_are_the_newest_oldest_first(buffer: Buffer) -> None:
    for step in range(30):
        buffer.append_metrics({"step": step, "loss": np.float32(0.5), "nan": float("nan")})
    assert [record["step"] for record in buffer.metrics(20)] == list(range(10, 30))
    assert buffer.metrics(1) == [{"step": 29, "loss": 0.5, "nan": None}]


def test_metrics_are_capped(buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.buffer.buffer._MAX_METRICS", 100)
    for step in range(400):
        buffer.append_metrics({"step": step})
    assert len(buffer.metrics(10_000)) < 400


def test_stats(buffer: Buffer) -> None:
    assert buffer.stats().streams == {}
    buffer.issue(group(0) + group(1) + group(0, "eval", 1) + group(3))
    buffer.store(play(ticket(0, 0, "eval", 1)))
    buffer.lease("a", 1, LONG_S)
    buffer.cancel("train", 3, "why")
    stats = buffer.stats()
    assert (stats.queued, stats.leased, stats.full) == (3, 1, False)
    assert stats.trajectory_bytes > 0
    assert stats.streams == {"eval": StreamStats(complete=1), "train": StreamStats(open=2, cancelled=1)}


def test_a_requested_number_of_actors(buffer: Buffer) -> None:
    assert buffer.desired_actors() is None
    buffer.set_desired_actors(0)
    assert buffer.desired_actors() == 0
    buffer.set_desired_actors(None)
    assert buffer.desired_actors() is None
    with pytest.raises(ValueError, match="-1"):
        buffer.set_desired_actors(-1)


# groups that go on without a member


@pytest.fixture
def keeping(redis_url: str, run_name: str) -> Iterator[Buffer]:
    buffer = Buffer.connect(redis_url, run_name, CONFIG, max_attempts=1, fewest_members=2)
    yield buffer
    buffer.close()


def test_a_group_completes_without_a_member_that_is_given_up(keeping: Buffer) -> None:
    tickets = group(0, size=3)
    keeping.issue(tickets)
    keeping.lease("a", 3, LONG_S)
    assert not keeping.fail("a", tickets[1].id, "broken game")
    assert keeping.issue(tickets) == 0
    assert keeping.lease("b", 3, LONG_S) == []
    assert keeping.store(play(tickets[1])) is Stored.UNKNOWN
    assert keeping.store(play(tickets[2])) is Stored.STORED
    assert keeping.store(play(tickets[0])) is Stored.COMPLETED
    assert [t.ticket for t in keeping.read("train", 0)] == [tickets[0], tickets[2]]
    assert keeping.cancelled("train") == {}


def test_a_member_given_up_last_completes_its_group(keeping: Buffer) -> None:
    tickets = group(0, size=3)
    keeping.issue(tickets)
    assert len(keeping.lease("a", 2, LONG_S)) == 2
    for member in tickets[:2]:
        keeping.store(play(member))
    keeping.lease("dies", 1, 0.01)
    expire_all(keeping, 1)
    assert keeping.complete("train") == [0]
    assert keeping.wait("train", 0)
    assert len(keeping.read("train", 0)) == 2


def test_too_few_members_cancel_their_group(keeping: Buffer) -> None:
    tickets = group(0, size=3)
    keeping.issue(tickets)
    keeping.lease("a", 3, LONG_S)
    assert [keeping.fail("a", member.id, "broken game") for member in tickets[:2]] == [False, True]
    assert keeping.cancelled("train") == {0: "train/0/1 failed 1 times, last: broken game"}
    keeping.remove("train", [0])
    assert keeping.issue(tickets) == 3
    assert keeping.stats().trajectory_bytes == 0
