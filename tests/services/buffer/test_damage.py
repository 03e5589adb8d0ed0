"""Whatever another program puts into a run's keys: one line that names the key, no traceback, no hang."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from redis import Redis

from services.buffer import FROM_THE_START, Buffer
from services.buffer.card import Bid
from services.buffer.commands import Action, Answer, Command
from services.buffer.keys import KINDS, NAMES, Keys
from services.buffer.owner import take
from services.codec import CodecError, encode
from services.config.tree import BufferConfig
from services.errors import AnchorageError, BufferDamaged
from services.schemas import Task, Ticket, Trajectory
from services.weights.channel import WeightVersion
from services.weights.coordination import Announcement, Coordination
from services.weights.rounds import Request, Round
from tests.services.buffer.lost_data import delete_run, restore_run, save_run, take_over

TASK = Task(env="e", split="s", index=0)
QUICK = BufferConfig(timeout_s=10, reconnect_s=2)

PUT: Mapping[str, Callable[[Redis, str], object]] = {
    "string": lambda client, key: client.set(key, "foreign"),
    "list": lambda client, key: client.rpush(key, "foreign"),
    "set": lambda client, key: client.sadd(key, "foreign"),
    "zset": lambda client, key: client.zadd(key, {"foreign": 1}),
    "hash": lambda client, key: client.hset(key, "foreign", "value"),
    "stream": lambda client, key: client.xadd(key, {"foreign": "value"}),
}
"""A key of each type."""


def ticket(group: int, member: int) -> Ticket:
    return Ticket(group=group, member=member, group_size=2, task=TASK, seed=member)


def group(number: int) -> list[Ticket]:
    return [ticket(number, member) for member in range(2)]


def command(number: int) -> Command:
    return Command(id=f"c{number}", action=Action.EVALUATE, by="me", at=0.0)


class Scene:
    """A run with something in every key, and every call that reads or writes it."""

    def __init__(self, url: str, run: str) -> None:
        self.buffer = Buffer.connect(url, run, QUICK, max_attempts=2, fewest_members=1)
        self.coordination = Coordination(url, run, QUICK)
        self.client: Redis = Redis.from_url(url)
        self.keys = Keys(run)
        self.buffer.own(take(self.buffer, run, "lineage", 600.0))
        self._fill()
        self.saved = save_run(self.buffer)
        assert {key.rpartition(":")[2] for key in self.saved} == set(NAMES)

    def _fill(self) -> None:
        buffer = self.buffer
        buffer.issue([t for number in range(5) for t in group(number)])
        for leased in buffer.lease("a", 2, 600.0):
            buffer.store(Trajectory(leased, ()))
        buffer.lease("a", 3, 600.0)
        for _ in range(2):
            buffer.fail("a", ticket(1, 0).id, "why")
            buffer.lease("a", 1, 600.0)
        buffer.fail("a", ticket(2, 0).id, "why")
        buffer.cancel("train", 4, "why")
        buffer.heartbeat("a", {"state": "playing"}, 600.0)
        buffer.set_state("running")
        buffer.set_manifest("{}")
        self.turn = buffer.card.take(Bid("a"), 600.0)
        buffer.card.take(Bid("b", first=True), 600.0)
        buffer.set_desired_actors(2)
        buffer.append_metrics({"step": 1})
        for number in range(2):
            buffer.commands.request(command(number))
        buffer.commands.answer("c0", Answer(at=0.0, done=True, text="done"))
        self.coordination.announce(Announcement(WeightVersion(1, 1, "x", "v1"), ()))
        self.coordination.request(Request("reader", "v1", 1))
        self.coordination.announce_round(Round(1, "v1", "e", "h", 1, 2, 2, {"reader": 1}))

    def calls(self) -> dict[str, Callable[[], object]]:
        buffer, coordination = self.buffer, self.coordination
        return {
            "owner": buffer.owner,
            "beat": buffer.beat,
            "known": lambda: buffer.known("train"),
            "complete": lambda: buffer.complete("train"),
            "cancelled": lambda: buffer.cancelled("train"),
            "read": lambda: [buffer.read("train", number) for number in buffer.complete("train")],
            "wait": lambda: buffer.wait("train", 0.0),
            "closed": lambda: buffer.closed("train", FROM_THE_START),
            "leases": lambda: buffer.leases(10),
            "full": buffer.full,
            "stats": buffer.stats,
            "contents": buffer.contents,
            "actors": buffer.actors,
            "state": buffer.state,
            "manifest": buffer.manifest,
            "desired_actors": buffer.desired_actors,
            "metrics": buffer.metrics,
            "commands": buffer.commands.all,
            "announced": coordination.announced,
            "requests": coordination.requests,
            "round": coordination.round,
            "check": buffer.check,
            "issue": lambda: buffer.issue(group(1) + group(7)),
            "renew": lambda: buffer.renew("a", [ticket(2, 1).id], 600.0),
            "lease": lambda: buffer.lease("a", 100, 600.0),
            "store": lambda: buffer.store(Trajectory(ticket(3, 0), ())),
            "fail": lambda: buffer.fail("a", ticket(2, 1).id, "why"),
            "release": lambda: buffer.release("a", [ticket(3, 1).id]),
            "expire": lambda: (buffer.renew("a", [ticket(3, 1).id], 0.0), buffer.expire()),
            "cancel": lambda: buffer.cancel("train", 3, "why"),
            "remove": lambda: buffer.remove("train", [0, 1, 2, 3, 4, 7]),
            "heartbeat": lambda: buffer.heartbeat("b", {}, 600.0),
            "set_state": lambda: buffer.set_state("running"),
            "set_manifest": lambda: buffer.set_manifest("{}"),
            "set_desired_actors": lambda: buffer.set_desired_actors(1),
            "append_metrics": lambda: buffer.append_metrics({"step": 2}),
            "request": lambda: buffer.commands.request(command(2)),
            "answer": lambda: buffer.commands.answer("c1", Answer(at=0.0, done=True, text="done")),
            "announce": lambda: coordination.announce(Announcement(WeightVersion(1, 1, "x", "v1"), ())),
            "request_weights": lambda: coordination.request(Request("reader", "v1", 1)),
            "withdraw": lambda: coordination.withdraw("reader"),
            "announce_round": lambda: coordination.announce_round(Round(1, "v1", "e", "h", 1, 2, 2, {"reader": 1})),
            "card": buffer.card.state,
            "take_card": lambda: buffer.card.take(Bid("c"), 600.0),
            "renew_card": lambda: buffer.card.renew(self.turn, 600.0, "phase"),
            "give_card": lambda: buffer.card.give(self.turn),
            "mend": buffer.mend,
            "release_owner": buffer.release_owner,
        }

    def lines(self) -> list[str]:
        """What the calls say. Anything but one clear line fails the test."""
        said = []
        for name, call in self.calls().items():
            # These two raise ValueErrors of their own, as the buffer's docstrings say.
            told = {"read": CodecError, "issue": ValueError}.get(name, AnchorageError)
            with contextlib.suppress(told):
                try:
                    call()
                except AnchorageError as error:
                    said.append(str(error))
        assert not any("\n" in line for line in said)
        return said

    def close(self) -> None:
        delete_run(self.buffer)
        self.client.close()
        self.coordination.close()
        self.buffer.close()


@pytest.fixture
def scene(redis_url: str, run_name: str) -> Iterator[Scene]:
    scene = Scene(redis_url, run_name)
    yield scene
    scene.close()


def test_nothing_is_wrong_with_an_intact_run(scene: Scene) -> None:
    scene.buffer.check()
    assert scene.buffer.mend() == []
    assert save_run(scene.buffer) == scene.saved
    assert scene.lines() == []


FOREIGN: list[tuple[str, Callable[[Redis, str], object]]] = [
    ("tickets", lambda client, key: client.hset(key, "1 train 000000000003 000000", "{}")),
    ("leases", lambda client, key: client.zadd(key, {"1 train 000000000003 000000": "inf"})),
    ("leases", lambda client, key: client.zadd(key, {"1 train 000000000003 000000": "-inf"})),
    ("leases", lambda client, key: client.zadd(key, {"1 train 000000000003 000000": 1e300})),
    ("queue", lambda client, key: client.zadd(key, {"1 train 000000000003 000001": 1})),
    ("complete", lambda client, key: client.zadd(key, {"1 train 000000000000": -1})),
    ("actor_deadlines", lambda client, key: client.zadd(key, {"a": "inf"})),
]


@pytest.mark.parametrize(("name", "put"), FOREIGN)
def test_a_value_of_the_right_type_that_no_run_writes_is_named(scene: Scene, name: str, put: Any) -> None:
    put(scene.client, scene.keys[name])
    with pytest.raises(BufferDamaged, match=f"{scene.keys[name]} .* which no run writes there") as caught:
        scene.buffer.check()
    assert "\n" not in str(caught.value)


def test_what_the_line_says_to_delete_lets_the_run_go_on(scene: Scene) -> None:
    """Deleting the damaged key alone does not: the tickets of `queue` are then unknown."""
    scene.client.hset(scene.keys["sizes"], "foreign", "1")
    with pytest.raises(BufferDamaged) as caught:
        scene.buffer.check()
    found = re.search(r"delete all keys (\S+) ", str(caught.value))
    assert found is not None
    doomed = list(scene.client.scan_iter(match=found[1], count=1000))
    assert sorted(key.decode() for key in doomed) == sorted(scene.saved)
    scene.client.delete(*doomed)
    scene.buffer.check()
    assert scene.buffer.issue(group(0)) == 2
    for leased in scene.buffer.lease("a", 2, 600.0):
        scene.buffer.store(Trajectory(leased, ()))
    assert scene.buffer.complete("train") == [0]


@pytest.mark.parametrize("name", ["weights_announced", "weights_wishes", "weights_round"])
def test_an_object_that_is_none_of_the_weights_is_named_and_ends_with_the_owner(scene: Scene, name: str) -> None:
    if name == "weights_wishes":
        scene.client.hset(scene.keys[name], "reader", "{}")
    else:
        scene.client.set(scene.keys[name], "{}")
    read = {"weights_announced": scene.coordination.announced, "weights_wishes": scene.coordination.requests}
    with pytest.raises(BufferDamaged, match=f"{scene.keys[name]} .* holds '{{}}'"):
        read.get(name, scene.coordination.round)()
    take_over(scene.buffer)
    assert (scene.coordination.announced(), scene.coordination.requests(), scene.coordination.round()) == (
        None,
        [],
        None,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_key_of_another_type_is_named(scene: Scene, name: str) -> None:
    key = scene.keys[name]
    for kind in set(PUT) - {KINDS[name]}:
        restore_run(scene.buffer, scene.saved)
        scene.client.delete(key)
        PUT[kind](scene.client, key)
        with pytest.raises(BufferDamaged, match=f"{key} is a {kind}, but a run keeps a {KINDS[name]} there"):
            scene.buffer.check()
        lines = scene.lines()
        assert lines
        assert all(key in line for line in lines)


TEXTS = [b"", b"foreign", b"\xff\xfe", b"-1", b"1e999", b"[1]", b"{}", b"null", b"9" * 30, b"nan"]


def foreign_entries(kind: str) -> Iterator[Callable[[Redis, str], object]]:
    for text in TEXTS:
        match kind:
            case "string":
                yield lambda client, key, text=text: client.set(key, text)
            case "list":
                yield lambda client, key, text=text: client.lpush(key, text)
            case "zset":
                yield lambda client, key, text=text: client.zadd(key, {text: 0})
                yield lambda client, key, text=text: client.zadd(key, {text: "inf"})
            case "hash":
                yield lambda client, key, text=text: client.hset(key, text, "foreign")
                yield lambda client, key, text=text: client.hset(key, mapping=dict.fromkeys(client.hkeys(key), text))
            case "stream":
                yield lambda client, key, text=text: client.xadd(key, {"json": text})
                yield lambda client, key, text=text: client.xadd(key, {text: "foreign"})


@pytest.mark.parametrize("name", NAMES)
def test_foreign_entries_of_a_key_are_one_line_or_nothing(scene: Scene, name: str) -> None:
    for put in foreign_entries(KINDS[name]):
        restore_run(scene.buffer, scene.saved)
        put(scene.client, scene.keys[name])
        scene.lines()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"owner"}))
def test_a_key_that_is_gone_is_no_traceback(scene: Scene, name: str) -> None:
    scene.client.delete(scene.keys[name])
    scene.lines()


def test_a_complete_group_that_lacks_a_member_is_not_read(scene: Scene) -> None:
    key = scene.keys["trajectories"]
    fields: list[Any] = sorted(scene.client.hkeys(key))
    scene.client.hdel(key, fields[1])
    with pytest.raises(CodecError, match="missing trajectory of ticket train/0/1"):
        scene.buffer.read("train", 0)


@pytest.mark.parametrize("other", [ticket(0, 0), ticket(7, 1), ticket(0, 1).model_copy(update={"stream": "eval-1"})])
def test_another_tickets_trajectory_is_not_read(scene: Scene, other: Ticket) -> None:
    key = scene.keys["trajectories"]
    fields: list[Any] = sorted(scene.client.hkeys(key))
    scene.client.hset(key, fields[1], encode(Trajectory(other, ())))
    with pytest.raises(CodecError, match=f"ticket train/0/1 holds a trajectory of ticket {other.id}"):
        scene.buffer.read("train", 0)
