"""The buffer between dispatcher, actors and learner: tickets out, trajectories in, complete groups on.

Invariants
- Every state change is one Lua script, so a process may die between any two calls; every call bears repetition.
- A group is open, complete or cancelled until it is removed; only then can it be issued afresh.
- First write wins: a ticket has at most one trajectory, whoever stores it.
- A ticket of an open group is queued, leased, stored or given up, and exactly one of them.
- Leases run on a clock of the run's own in Redis (`prelude.lua`), which steps of the server's clock do not move.
- A buffer that is given the run's owner fails with RunTaken, and changes nothing, once another process has the run.
- What in Redis is not of a run's making is BufferDamaged, one line with the key's name.
- Beyond the cap no new training group is begun, but for one that later groups have overtaken: the learner waits for it.
  A group that an actor has begun can always finish. Nothing is ever trimmed.
- A group's tickets are issued together: Redis never knows a part of a group for good.
"""

from __future__ import annotations

import enum
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from typing import Any

import orjson
from redis.exceptions import ResponseError

from services.buffer import keys
from services.buffer.commands import CommandLog
from services.buffer.connection import Arg, Connection
from services.buffer.contents import GroupContents, parse_contents
from services.buffer.integrity import damaged, find_damage
from services.buffer.keys import MAX_GROUP_SIZE
from services.buffer.owner import Found, Owner, in_use, parse_found
from services.buffer.stats import BufferStats, Heartbeat, ServerStats, StreamStats, parse_info
from services.buffer.suitability import check_server, evicts
from services.codec import CodecError, decode, encode
from services.config.tree import BufferConfig
from services.errors import AnchorageError, BufferDamaged, RunTaken
from services.schemas import Ticket, Trajectory

_ISSUE_CHUNK = 512
_MAX_REASON_CHARS = 500
_MAX_METRICS = 10_000
_SHORTEST_POLL_S = 0.005
_LONGEST_POLL_S = 0.1


class Stored(enum.Enum):
    """What became of a trajectory: kept; kept, its group is complete; not kept, there is one; not kept, no such ticket.

    A call repeated after a lost answer may say DUPLICATE of its own trajectory."""

    STORED = "STORED"
    COMPLETED = "COMPLETED"
    DUPLICATE = "DUPLICATE"
    UNKNOWN = "UNKNOWN"


class Buffer:
    """One run's buffer in Redis. Thread-safe; blocking, so an event loop calls it in a thread.

    Every method raises RedisUnavailable when Redis stays away for `reconnect_s`, BufferDamaged when a key of the run
    holds something else than it should, and RunTaken when the run is no longer the owner's.
    """

    def __init__(
        self,
        connection: Connection,
        run: str,
        config: BufferConfig,
        max_attempts: int,
        fewest_members: int = 0,
        owner: Owner | None = None,
    ) -> None:
        self._connection = connection
        self._client = connection.client
        self._run_name = run
        self._keys = keys.Keys(run)
        self._owner = owner
        self._script = cache(lambda name: connection.script(name, self._keys))
        self._cap_bytes = config.max_mib * 2**20
        self.commands = CommandLog(self._run, self._understood)
        self._limits = (max_attempts, fewest_members)
        self._seen: dict[str, int] = {}
        self._seen_lock = threading.Lock()

    @classmethod
    def connect(
        cls,
        url: str,
        run: str,
        config: BufferConfig,
        *,
        max_attempts: int = 3,
        fewest_members: int = 0,
        owner: Owner | None = None,
    ) -> Buffer:
        """The buffer of `run`, after Redis has answered.

        Without an `owner` it is for those who look at a run or ask something of it; a run and its actors have one.

        A ticket that has failed `max_attempts` times cancels its group; where `fewest_members` is given, only if fewer
        were left without it, else the group completes without it.

        Raises:
            RedisUnavailable: not an address, wrong password, or no answer within `config.reconnect_s`.
            ValueError: `run` is not a plain name.
        """
        connection = Connection(url, config)
        buffer = cls(connection, run, config, max_attempts, fewest_members, owner)
        try:
            connection.call(connection.client.ping)
        except Exception:
            connection.close()
            raise
        return buffer

    def close(self) -> None:
        """Close the connections. What is in Redis stays."""
        self._connection.close()

    # dispatcher

    def issue(self, tickets: Sequence[Ticket]) -> int:
        """Make tickets leasable; the number that were new. A ticket of a group known in any state is a no-op.

        Raises:
            ValueError: a member outside of its group, too large a group, or one that is known with another size.
        """
        for ticket in tickets:
            if ticket.group_size > MAX_GROUP_SIZE:
                raise ValueError(f"a group has at most {MAX_GROUP_SIZE} members, not {ticket.group_size}")
            if not 0 <= ticket.member < ticket.group_size:
                raise ValueError(f"ticket {ticket.id} is outside of its group of {ticket.group_size}")
        return sum(self._issue(chunk) for chunk in _chunks(tickets))

    def known(self, stream: str) -> set[int]:
        """Groups that Redis holds in any state."""
        fields = self._call("hkeys", "sizes")
        with self._understood():
            return {group for name, group in map(keys.parse_group, fields) if name == stream}

    def complete(self, stream: str) -> list[int]:
        """Complete groups, ascending."""
        fields = self._call("zrangebylex", "complete", *keys.stream_range(stream))
        with self._understood():
            return [keys.parse_group(field)[1] for field in fields]

    def cancelled(self, stream: str) -> dict[int, str]:
        """Cancelled groups and their reasons."""
        found = self._call("hgetall", "reasons")
        with self._understood():
            reasons = [(keys.parse_group(field), reason.decode()) for field, reason in found.items()]
        return {group: reason for (name, group), reason in sorted(reasons) if name == stream}

    def read(self, stream: str, group: int) -> list[Trajectory]:
        """The trajectories of a complete group, in member order; members that were given up are missing.

        Raises:
            KeyError: the group is not complete.
            CodecError: stored by another schema version, or damaged; a member is missing, or another ticket's
                trajectory is in its place.
        """
        documents = self._run("read", keys.group_field(stream, group))
        if not documents:
            raise KeyError(f"group {stream}/{group} is not complete")
        return [
            _decoded(document, f"{stream}/{group}/{member}", len(documents))
            for member, document in enumerate(documents)
            if document is not None
        ]

    def cancel(self, stream: str, group: int, reason: str) -> None:
        """Drop all of a group but the reason, which stays until `remove`. No-op on unknown and cancelled groups."""
        self._run("cancel", keys.group_field(stream, group), _short(reason))

    def remove(self, stream: str, groups: Sequence[int]) -> None:
        """Groups leave Redis entirely: after the checkpoint that records them, or to be issued afresh."""
        if groups:
            self._run("remove", stream, *(keys.group_field(stream, group) for group in groups))

    def wait(self, stream: str, timeout_s: float) -> bool:
        """Block until a group has completed or been cancelled since the last True for this stream; False on timeout.

        What happens between a True and the next call is not missed. For one waiting thread a stream.
        """
        deadline = time.monotonic() + timeout_s
        delay = _SHORTEST_POLL_S
        while True:
            answer = self._call("hget", "changed", stream)
            with self._understood():
                sequence = None if answer is None else int(answer)
            if sequence is not None and self._is_news(stream, sequence):
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, delay))
            delay = min(2 * delay, _LONGEST_POLL_S)

    # actors

    def lease(self, actor: str, limit: int, lease_s: float) -> list[Ticket]:
        """Up to `limit` tickets for `lease_s` seconds: evaluation streams first, then by stream, group and member."""
        if limit < 1:
            return []
        answers = self._run("lease", actor, limit, _milliseconds(lease_s), self._cap_bytes)
        with self._understood():
            return [Ticket.model_validate_json(answer) for answer in answers]

    def renew(self, actor: str, ticket_ids: Sequence[str], lease_s: float) -> list[str]:
        """Hold the tickets for another `lease_s` seconds from now; those that are no longer ours."""
        if not ticket_ids:
            return []
        lost = self._run("renew", actor, _milliseconds(lease_s), *map(keys.field_of_id, ticket_ids))
        return [ticket_ids[position] for position in lost]

    def release(self, actor: str, ticket_ids: Sequence[str]) -> None:
        """Give tickets back to their place at the front of the queue; no attempt is counted."""
        if ticket_ids:
            self._run("release", actor, *map(keys.field_of_id, ticket_ids))

    def fail(self, actor: str, ticket_id: str, reason: str) -> bool:
        """Count a failed attempt of a ticket that `actor` holds. True: its group is cancelled."""
        answer = self._run("fail", actor, keys.field_of_id(ticket_id), _short(reason), *self._limits)
        return bool(answer)

    def store(self, trajectory: Trajectory) -> Stored:
        """In one step: keep the trajectory, take its ticket out of play, count it, make its group visible when full.

        Raises:
            CodecError: the trajectory breaks the schema.
        """
        answer = self._run("store", keys.field_of(trajectory.ticket), encode(trajectory))
        return Stored(answer.decode())

    def expire(self) -> int:
        """Hand back tickets whose lease has run out, each a failed attempt; their number. Anyone may call it."""
        return int(self._run("expire", *self._limits))

    # run-wide

    def own(self, owner: Owner) -> None:
        """From now on every call is `owner`'s."""
        self._owner = owner

    def owner(self) -> Found | None:
        """Who runs the run, or ran it last; None before the first."""
        return parse_found(self._run("owner"))

    def take(self, seen: Found | None, unique: str, lineage: str, record: str) -> str | None:
        """Take the run's name from the owner that was `seen`; the token, or None when that has changed meanwhile.

        Everything of another lineage is deleted; of the same lineage, leases end. See `services.buffer.owner.take`.
        """
        token, beats = ("", "") if seen is None else (seen.token, seen.beats)
        answer = self._run("take", token, beats, unique, lineage, record)
        return None if answer is None else answer.decode()

    def beat(self) -> None:
        """The owner's sign of life; also a check that it is the owner still."""
        self._run("beat")

    def release_owner(self) -> None:
        """Let go of the run's name; what is in Redis stays."""
        self._run("release_owner")

    def check(self) -> None:
        """Raises BufferDamaged when a key of the run holds what no run writes there."""
        found = self._connection.call(lambda: find_damage(self._client, self._keys))
        if found is not None:
            raise BufferDamaged(found)

    def mend(self) -> list[tuple[str, int]]:
        """Remove the open groups of which a ticket is in no place, so that they are issued again: stream and group.

        Also what belongs to no group, and a wrong count of stored bytes. For keys that `check` has found sound.
        """
        removed = self._run("mend")
        with self._understood():
            return sorted(map(keys.parse_group, removed))

    def set_manifest(self, text: str) -> None:
        self._run("set_manifest", text)

    def manifest(self) -> str | None:
        answer = self._call("get", "manifest")
        with self._understood():
            return None if answer is None else answer.decode()

    def set_state(self, state: str) -> None:
        self._run("set_state", state)

    def state(self) -> str:
        """`running`, `stopping`, or nothing before the first `set_state`."""
        answer = self._call("get", "state") or b""
        with self._understood():
            return answer.decode()

    def set_desired_actors(self, count: int | None) -> None:
        """Wish for so many rollout actors; None: as many as the cluster has room for. ValueError below 0."""
        if count is None:
            self._call("delete", "desired_actors")
        elif count < 0:
            raise ValueError(f"{count} rollout actors cannot be wished for")
        else:
            self._call("set", "desired_actors", count)

    def desired_actors(self) -> int | None:
        """The wish, None without one."""
        answer = self._call("get", "desired_actors")
        with self._understood():
            return None if answer is None else _natural(answer)

    def heartbeat(self, actor: str, info: Mapping[str, object], ttl_s: float) -> None:
        """Keep `actor` listed, with JSON-able facts, for `ttl_s` seconds."""
        self._run("heartbeat", actor, _json(info), _milliseconds(ttl_s))

    def actors(self) -> dict[str, dict[str, object]]:
        """Facts of the actors whose heartbeat has not expired."""
        return {name: beat.facts for name, beat in self.heartbeats().items()}

    def heartbeats(self) -> dict[str, Heartbeat]:
        """The same, and when each was heard last."""
        answer = self._run("actors")
        with self._understood():
            beats = zip(answer[::3], answer[1::3], answer[2::3], strict=True)
            return {name.decode(): Heartbeat(_object(facts), ms / 1000) for name, facts, ms in beats}

    def append_metrics(self, record: Mapping[str, object]) -> None:
        """Add a JSON-able record (NaN becomes null); old records leave when there are too many."""
        self._run("append_metrics", uuid.uuid4().hex, _json(record), _MAX_METRICS)

    def metrics(self, count: int = 1000) -> list[dict[str, object]]:
        """The newest `count` records, oldest first."""
        entries = self._call("xrevrange", "metrics", "+", "-", count)
        with self._understood():
            return [_object(fields[b"json"]) for _, fields in reversed(entries)]

    def stats(self) -> BufferStats:
        answer = self._run("stats")
        with self._understood():
            queued, leased, stored, groups, complete, cancelled = answer
            known, full, ended = (_per_stream(fields) for fields in (groups, complete, cancelled))
        streams = {
            stream: StreamStats(known[stream] - full[stream] - ended[stream], full[stream], ended[stream])
            for stream in sorted(known)
        }
        return BufferStats(queued, leased, streams, stored, self._cap_bytes)

    def server(self) -> ServerStats:
        """How the Redis itself is, which other runs may share."""
        return parse_info(self._connection.call(self._client.info))

    def check_server(self) -> list[str]:
        """Lines to tell about a Redis of somebody else's. RedisUnsuitable when it cannot hold a run."""
        return check_server(self._connection, self._cap_bytes // 2**20)

    def evicts(self) -> str | None:
        """Why this Redis loses data without an error by now; None while it does not."""
        return evicts(self._connection)

    def contents(self) -> list[GroupContents]:
        """Every group and where each of its tickets is, in the order in which they are handed out."""
        answer = self._run("contents")
        with self._understood():
            return parse_contents(*answer)

    def _issue(self, tickets: Sequence[Ticket]) -> int:
        args: list[Arg] = [arg for t in tickets for arg in (keys.field_of(t), t.group_size, t.model_dump_json())]
        answer = self._run("issue", *args)
        if isinstance(answer, int):
            return answer
        with self._understood():
            (stream, group), size = keys.parse_group(answer[0]), int(answer[1])
        raise ValueError(f"group {stream}/{group} is known with {size} members; remove it to change its size")

    def _is_news(self, stream: str, sequence: int) -> bool:
        with self._seen_lock:
            if self._seen.get(stream) == sequence:
                return False
            self._seen[stream] = sequence
            return True

    def _run(self, script: str, *args: Arg) -> Any:
        owner = self._owner
        fence = "" if owner is None else owner.token
        try:
            return self._script(script)((*args, fence))
        except ResponseError as error:
            if owner is None or not str(error).startswith("FORGOTTEN"):
                raise self._explained(error) from error
        # Redis has lost data, the owner's among it.
        try:
            self._script("restore_owner")((owner.token, owner.lineage, owner.record, ""))
            return self._script(script)((*args, fence))
        except ResponseError as error:
            raise self._explained(error) from error

    def _call(self, command: str, key: str, *args: object) -> Any:
        method = getattr(self._client, command)
        try:
            return self._connection.call(lambda: method(self._keys[key], *args))
        except ResponseError as error:
            raise self._explained(error) from error

    def _explained(self, error: ResponseError) -> AnchorageError:
        """What to raise in place of an error that Redis answered."""
        if str(error).startswith("TAKEN"):
            found = parse_found(self._script("owner")(("",)))
            return RunTaken(in_use(self._run_name, None if found is None else found.record))
        return self._connection.call(lambda: damaged(self._client, self._keys, error))

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Around the reading of an answer: what cannot be read is told by the name of its key."""
        try:
            yield
        except (ValueError, TypeError, KeyError, IndexError) as error:
            problem = error
        else:
            return
        raise self._connection.call(lambda: damaged(self._client, self._keys, problem)) from problem


def _chunks(tickets: Sequence[Ticket]) -> Iterator[list[Ticket]]:
    """The tickets in pieces of at most `_ISSUE_CHUNK`, groups kept whole even where one is larger."""
    chunk: list[Ticket] = []
    for _, group in groupby(tickets, key=lambda ticket: (ticket.stream, ticket.group)):
        members = list(group)
        if chunk and len(chunk) + len(members) > _ISSUE_CHUNK:
            yield chunk
            chunk = []
        chunk += members
    if chunk:
        yield chunk


def _decoded(document: bytes, ticket: str, group_size: int) -> Trajectory:
    """The trajectory of the ticket with this id. Raises CodecError when it is another one's, or there is none."""
    if not document:
        raise CodecError(f"the trajectory of ticket {ticket} is missing")
    trajectory = decode(document)
    if trajectory.ticket.id != ticket:
        raise CodecError(f"in the place of ticket {ticket} is a trajectory of {trajectory.ticket.id}")
    if trajectory.ticket.group_size != group_size:
        raise CodecError(f"ticket {ticket} is of a group of {trajectory.ticket.group_size}, not of {group_size}")
    return trajectory


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _short(reason: str) -> bytes:
    return reason[:_MAX_REASON_CHARS].encode(errors="replace")


def _json(value: Mapping[str, object]) -> bytes:
    return orjson.dumps(dict(value), option=orjson.OPT_SERIALIZE_NUMPY)


def _object(text: bytes) -> dict[str, object]:
    """A JSON object. Raises ValueError when it is something else."""
    found = orjson.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _natural(text: bytes) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(f"{number} is below 0")
    return number


def _per_stream(fields: Sequence[bytes]) -> Counter[str]:
    return Counter(keys.parse_group(field)[0] for field in fields)
