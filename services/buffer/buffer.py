"""The buffer between dispatcher, actors and learner: tickets out, trajectories in, complete groups to the learner.

Invariants
- Every state change is one Lua script, so a process may die between any two calls. Every call is idempotent.
- A group is open, complete or cancelled until it is removed; only then can it be issued again.
- First write wins: a ticket has at most one trajectory, whoever stores it.
- A ticket of an open group is in exactly one state: queued, leased, stored or given up.
- Leases run on the run's own clock in Redis (`prelude.lua`), so changes of the server's clock neither end nor prolong
  them.
- Once another process owns the run, calls of a buffer with an owner raise RunTaken and change nothing.
- Anything in the run's keys that no run wrote raises BufferDamaged, one line with the key's name.
- Above the cap no actor begins a new training group, except one that later groups have overtaken, since the learner
  waits for it. A group that has begun can always finish. Nothing is ever trimmed.
- The tickets of a group are issued together: Redis never keeps a part of a group.
"""

from __future__ import annotations

import enum
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from typing import Any

import orjson
from redis.exceptions import ResponseError

from services.backoff import Backoff
from services.buffer import keys
from services.buffer.card import Card
from services.buffer.commands import CommandLog
from services.buffer.connection import MANY, Arg, Connection
from services.buffer.contents import GroupContents, Lease, parse_contents, parse_leases
from services.buffer.integrity import damaged, find_damage
from services.buffer.keys import MAX_GROUP_SIZE
from services.buffer.owner import Found, Owner, in_use, parse_found
from services.buffer.stats import BufferStats, Closed, Heartbeat, ServerStats, StreamStats, parse_info
from services.buffer.suitability import check_server, evicts
from services.codec import CodecError, decode, encode
from services.config.tree import BufferConfig
from services.errors import AnchorageError, BufferDamaged, RunTaken
from services.schemas import Ticket, Trajectory

_ISSUE_CHUNK = 512
_REMOVE_CHUNK = 32
_EXPIRE_CHUNK = 500
_CLOSED_CHUNK = 1000
"""A script blocks Redis for every client, so none handles more tickets (issue, expire) or groups than this at once."""
_MENDED = (
    *("sizes", "reasons", "complete", "closed", "counts", "trajectories", "given_up"),
    *("tickets", "holders", "attempts", "queue", "leases"),
)
"""What `mend` looks at, in this order."""
_MEND_GROUPS, _MEND_ENTRIES = 16, 1000
FROM_THE_START = -1
"""For `Buffer.closed`: every group that is closed."""
_MAX_REASON_CHARS = 500
_MAX_METRICS = 10_000
_POLL = Backoff(0.005, 0.1)


class Stored(enum.Enum):
    """Outcome of storing a trajectory.

    Attributes:
        STORED: stored.
        COMPLETED: stored, and its group is now complete.
        DUPLICATE: not stored, the ticket has a trajectory. A retry after a lost reply may find its own.
        UNKNOWN: not stored, there is no such ticket (any more).
    """

    STORED = "STORED"
    COMPLETED = "COMPLETED"
    DUPLICATE = "DUPLICATE"
    UNKNOWN = "UNKNOWN"


class Buffer:
    """One run's buffer in Redis. Thread-safe; blocking, so an event loop calls it in a thread.

    Every method raises RedisUnavailable if Redis is unreachable for `reconnect_s`, BufferDamaged if a key of the run
    holds invalid data, and RunTaken if another process owns the run.

    Example:
        buffer = Buffer.connect("redis://localhost:6379/0", "first", BufferConfig())
        buffer.issue(tickets)                                   # dispatcher
        [ticket] = buffer.lease("actor-0", limit=1, lease_s=60)  # actor
        buffer.store(play(ticket))
        if buffer.wait("train", timeout_s=60):                  # learner
            trajectories = buffer.read("train", buffer.complete("train")[0])
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
        self.commands = CommandLog(self._run, self._parsing)
        self.card = Card(self._run, self._parsing)
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
        connections: int = MANY,
    ) -> Buffer:
        """Connect to the buffer of `run`. Returns once Redis has responded.

        Args:
            url: address of the Redis.
            run: name of the run.
            config: limits and timeouts.
            max_attempts: a ticket that has failed so often is given up, and its group cancelled.
            fewest_members: if above 0, the group is cancelled only if fewer members were left; otherwise it completes
                without the ticket.
            owner: for the run and its actors; None for readers and for those who request something of the run.
            connections: most connections at once; further calls wait for one.

        Raises:
            RedisUnavailable: invalid address, wrong password, or no response within `config.reconnect_s`.
            ValueError: `run` is not a plain name.
        """
        connection = Connection(url, config, connections)
        buffer = cls(connection, run, config, max_attempts, fewest_members, owner)
        try:
            connection.call(connection.client.ping)
        except Exception:
            connection.close()
            raise
        return buffer

    def close(self) -> None:
        """Close the connections. Data in Redis stay."""
        self._connection.close()

    # dispatcher

    def issue(self, tickets: Sequence[Ticket]) -> int:
        """Queue tickets for actors; the number of new ones. Tickets that the buffer knows in any state are skipped.

        Raises:
            ValueError: member outside its group, group too large, or group known with another size.
        """
        for ticket in tickets:
            if ticket.group_size > MAX_GROUP_SIZE:
                raise ValueError(f"group size must be <= {MAX_GROUP_SIZE}, got {ticket.group_size}")
            if not 0 <= ticket.member < ticket.group_size:
                raise ValueError(f"ticket {ticket.id} is outside its group of {ticket.group_size}")
        return sum(self._issue(chunk) for chunk in _chunks(tickets))

    def known(self, stream: str) -> set[int]:
        """Numbers of the stream's groups in any state. Reads every group's name: not for frequent calls."""
        fields = self._call("hkeys", "sizes")
        with self._parsing():
            return set(keys.groups_of(stream, fields))

    def complete(self, stream: str, first: int | None = None) -> list[int]:
        """Numbers of the stream's complete groups, ascending; of the `first` ones only, or of all."""
        page = () if first is None else (0, first)
        fields = self._call("zrangebylex", "complete", *keys.stream_range(stream), *page)
        with self._parsing():
            return list(keys.groups_of(stream, fields))

    def cancelled(self, stream: str, some: int | None = None) -> dict[int, str]:
        """Reason by number of the stream's cancelled groups, ascending; of any `some` of them, or of all."""
        found: dict[int, str] = {}
        cursor = None
        while cursor != 0 and (some is None or len(found) < some):
            cursor, page = self._call("hscan", "reasons", cursor or 0, f"{keys.stream_prefix(stream)}*", _CLOSED_CHUNK)
            with self._parsing():
                reasons = [reason.decode() for reason in page.values()]
                found.update(zip(keys.groups_of(stream, page), reasons, strict=True))
        return dict(sorted(found.items())[:some])

    def closed(self, stream: str, after: int) -> Closed:
        """The stream's groups that were completed or cancelled after a moment, and are still known.

        Costs as much as there are such groups, unlike `complete` and `cancelled`, which list all. If Redis loses data,
        groups may be open again that an earlier call returned: whoever relies on this starts again now and then.

        Args:
            stream: of the groups.
            after: `Closed.upto` of the previous call, or `FROM_THE_START`.

        Example:
            first = buffer.closed("train", FROM_THE_START)   # Closed(1764537000123, [0, 1], {2: "…"})
            buffer.closed("train", first.upto)               # Closed(1764537000123, [], {}) until another is closed
        """
        complete: list[int] = []
        cancelled: dict[int, str] = {}
        more = True
        while more:
            reply = self._run("closed", stream, after, _CLOSED_CHUNK)
            with self._parsing():
                after, more = int(reply[0]), bool(reply[3])
                complete += keys.groups_of(stream, reply[1])
                reasons = (reason.decode() for reason in reply[2][1::2])
                cancelled.update(zip(keys.groups_of(stream, reply[2][::2]), reasons, strict=True))
        return Closed(after, complete, cancelled)

    def read(self, stream: str, group: int) -> list[Trajectory]:
        """Read the trajectories of a complete group in member order, without the members that were given up.

        Raises:
            KeyError: the group is not complete.
            CodecError: a trajectory is damaged, missing, of another schema version, or of another ticket.
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
        """Drop a group except for the reason, which stays until `remove`. No-op for unknown and cancelled groups."""
        self._run("cancel", keys.group_field(stream, group), _short(reason))

    def remove(self, stream: str, groups: Sequence[int]) -> None:
        """Remove groups entirely: after the checkpoint that records them, or to issue them again."""
        for start in range(0, len(groups), _REMOVE_CHUNK):
            chunk = groups[start : start + _REMOVE_CHUNK]
            self._run("remove", stream, *(keys.group_field(stream, group) for group in chunk))

    def wait(self, stream: str, timeout_s: float) -> bool:
        """Block until a group of the stream completes or is cancelled; False on timeout.

        Events between a True and the next call are not missed. At most one thread may wait for a stream.
        """
        polls = _POLL.within(timeout_s)
        while True:
            reply = self._call("hget", "changed", stream)
            with self._parsing():
                sequence = None if reply is None else int(reply)
            if sequence is not None and self._is_news(stream, sequence):
                return True
            delay = polls.next_delay()
            if delay is None:
                return False
            time.sleep(delay)

    # actors

    def lease(self, actor: str, limit: int, lease_s: float) -> list[Ticket]:
        """Lease up to `limit` tickets for `lease_s` seconds, evaluation first, then by stream, group and member."""
        if limit < 1:
            return []
        replies = self._run("lease", actor, limit, _milliseconds(lease_s), self._cap_bytes)
        with self._parsing():
            return [Ticket.model_validate_json(reply) for reply in replies]

    def renew(self, actor: str, ticket_ids: Sequence[str], lease_s: float) -> list[str]:
        """Extend leases to `lease_s` seconds from now; the ids of the tickets that `actor` no longer holds."""
        if not ticket_ids:
            return []
        lost = self._run("renew", actor, _milliseconds(lease_s), *map(keys.field_of_id, ticket_ids))
        return [ticket_ids[position] for position in lost]

    def release(self, actor: str, ticket_ids: Sequence[str]) -> None:
        """Return tickets to their place in the queue without counting an attempt."""
        if ticket_ids:
            self._run("release", actor, *map(keys.field_of_id, ticket_ids))

    def fail(self, actor: str, ticket_id: str, reason: str) -> bool:
        """Count a failed attempt of a ticket that `actor` holds; whether its group is cancelled."""
        reply = self._run("fail", actor, keys.field_of_id(ticket_id), _short(reason), *self._limits)
        return bool(reply)

    def store(self, trajectory: Trajectory) -> Stored:
        """Atomically store the trajectory, settle its ticket, and complete its group if it was the last one.

        Raises:
            CodecError: the trajectory violates the schema.
        """
        reply = self._run("store", keys.field_of(trajectory.ticket), encode(trajectory))
        return Stored(reply.decode())

    def expire(self) -> int:
        """Requeue tickets whose lease has expired, each a failed attempt; their number. Any process may call it."""
        total = 0
        while True:
            expired = int(self._run("expire", *self._limits, _EXPIRE_CHUNK))
            total += expired
            if expired < _EXPIRE_CHUNK:
                return total

    # run-wide

    def own(self, owner: Owner) -> None:
        """Make every following call in the name of `owner`."""
        self._owner = owner

    def owner(self) -> Found | None:
        """The owner of the run, or its last one; None before the first."""
        return parse_found(self._run("owner"))

    def take(self, seen: Found | None, unique: str, lineage: str, record: str) -> str | None:
        """Take over the run from the owner that was `seen`; the new token, or None if the owner has changed since.

        Data of another lineage are deleted; of the same lineage, leases end. See `services.buffer.owner.take`.
        """
        token, beats = ("", "") if seen is None else (seen.token, seen.beats)
        reply = self._run("take", token, beats, unique, lineage, record)
        return None if reply is None else reply.decode()

    def beat(self) -> None:
        """Record a heartbeat of the owner; this also checks that it still is the owner."""
        self._run("beat")

    def check_owner(self) -> None:
        """Raise RunTaken if another process owns the run; unlike `beat`, this is no sign of life of the owner."""
        self._run("check_owner")

    def release_owner(self) -> None:
        """Release the run's name. Data in Redis stay."""
        self._run("release_owner")

    def check(self) -> None:
        """Raise BufferDamaged if a key of the run holds invalid data."""
        found = self._connection.call(lambda: find_damage(self._client, self._keys))
        if found is not None:
            raise BufferDamaged(found)

    def mend(self) -> list[tuple[str, int]]:
        """Remove inconsistent open groups, so that they are issued again; stream and number of each.

        Also removes entries that belong to no group and corrects the count of stored bytes. Call `check` first: this
        expects valid keys.
        """
        removed: list[tuple[str, int]] = []
        for name in _MENDED:
            at_once = _MEND_GROUPS if name == "sizes" else _MEND_ENTRIES
            listing = ("hkeys", name) if keys.KINDS[name] == "hash" else ("zrange", name, 0, -1)
            fields = self._call(*listing)
            for start in range(0, len(fields), at_once):
                dropped = self._run("mend", name, *fields[start : start + at_once])
                if name == "sizes":
                    with self._parsing():
                        removed += map(keys.parse_group, dropped)
        self._run("mend_totals")
        return sorted(removed)

    def set_manifest(self, text: str) -> None:
        """Store the run's manifest, JSON."""
        self._run("set_manifest", text)

    def manifest(self) -> str | None:
        """The run's manifest, JSON; None before the first `set_manifest`."""
        reply = self._call("get", "manifest")
        with self._parsing():
            return None if reply is None else reply.decode()

    def announce_weights(self, announcement: str | bytes) -> None:
        """Set the announcement of a collective weight channel, JSON; empty: remove it."""
        self._run("announce_weights", announcement)

    def call_weight_round(self, round_: str | bytes) -> None:
        """Set the latest round of a collective weight channel, JSON."""
        self._run("call_weight_round", round_)

    def set_state(self, state: str) -> None:
        """Store the run's state, which actors follow: `running`, `paused` or `stopping`."""
        self._run("set_state", state)

    def state(self) -> str:
        """The state set last; empty before the first `set_state`."""
        reply = self._call("get", "state") or b""
        with self._parsing():
            return reply.decode()

    def set_desired_actors(self, count: int | None) -> None:
        """Request a number of rollout actors; None: as many as the cluster has room for. ValueError below 0."""
        if count is None:
            self._call("delete", "desired_actors")
        elif count < 0:
            raise ValueError(f"actor count must be >= 0, got {count}")
        else:
            self._call("set", "desired_actors", count)

    def desired_actors(self) -> int | None:
        """The requested number of rollout actors; None if none was requested."""
        reply = self._call("get", "desired_actors")
        with self._parsing():
            return None if reply is None else _natural(reply)

    def heartbeat(self, actor: str, info: Mapping[str, object], ttl_s: float) -> str:
        """List `actor` with JSON-able facts for the next `ttl_s` seconds. Returns the run's state, as `state` does."""
        reply = self._run("heartbeat", actor, _json(info), _milliseconds(ttl_s))
        with self._parsing():
            return str(reply.decode())

    def actors(self) -> dict[str, dict[str, object]]:
        """Facts of the actors whose heartbeat has not expired, by name."""
        return {name: beat.facts for name, beat in self.heartbeats().items()}

    def heartbeats(self) -> dict[str, Heartbeat]:
        """The same with the age of each heartbeat."""
        reply = self._run("actors")
        with self._parsing():
            beats = zip(*reply, strict=True)
            return {name.decode(): Heartbeat(_object(facts), ms / 1000) for name, facts, ms in beats}

    def append_metrics(self, record: Mapping[str, object]) -> None:
        """Add a JSON-able record (NaN becomes null); old records leave when there are too many."""
        self._run("append_metrics", uuid.uuid4().hex, _json(record), _MAX_METRICS)

    def metrics(self, count: int = 1000) -> list[dict[str, object]]:
        """The newest `count` records, oldest first."""
        entries = self._call("xrevrange", "metrics", "+", "-", count)
        with self._parsing():
            return [_object(fields[b"json"]) for _, fields in reversed(entries)]

    def stats(self) -> BufferStats:
        """Count tickets, groups and bytes."""
        reply = self._run("stats")
        with self._parsing():
            queued, leased, stored, counts = reply
            return BufferStats(queued, leased, _per_stream(counts), stored, self._cap_bytes)

    def full(self) -> bool:
        """Whether the stored trajectories are above the cap, as `stats` says with all other figures."""
        reply = self._call("get", "bytes")
        with self._parsing():
            return int(reply or 0) > self._cap_bytes

    def server(self) -> ServerStats:
        """State of the Redis server itself, which other runs may share."""
        return parse_info(self._connection.call(self._client.info))

    def check_server(self) -> list[str]:
        """Warnings about a Redis that the run did not start. RedisUnsuitable if it cannot hold a run."""
        return check_server(self._connection, self._cap_bytes // 2**20)

    def evicts(self) -> str | None:
        """Why this Redis may now lose data without an error; None if it does not."""
        return evicts(self._connection)

    def contents(self) -> list[GroupContents]:
        """Every group and the place of each of its tickets, in the order in which they are leased."""
        reply = self._run("contents")
        with self._parsing():
            return parse_contents(*reply)

    def leases(self, first: int) -> tuple[list[Lease], int]:
        """The `first` leases to expire, and the number of all."""
        reply = self._run("leases", first)
        with self._parsing():
            return parse_leases(*reply)

    def _issue(self, tickets: Sequence[Ticket]) -> int:
        args: list[Arg] = [arg for t in tickets for arg in (keys.field_of(t), t.group_size, t.model_dump_json())]
        reply = self._run("issue", *args)
        if isinstance(reply, int):
            return reply
        with self._parsing():
            (stream, group), size = keys.parse_group(reply[0]), int(reply[1])
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
                raise self._translated(error) from error
        # Redis has lost data, among them the owner.
        try:
            self._script("restore_owner")((owner.token, owner.lineage, owner.record, ""))
            return self._script(script)((*args, fence))
        except ResponseError as error:
            raise self._translated(error) from error

    def _call(self, command: str, key: str, *args: object) -> Any:
        method = getattr(self._client, command)
        try:
            return self._connection.call(lambda: method(self._keys[key], *args))
        except ResponseError as error:
            raise self._translated(error) from error

    def _translated(self, error: ResponseError) -> AnchorageError:
        """The error to raise instead of a response error of Redis."""
        if str(error).startswith("TAKEN"):
            found = parse_found(self._script("owner")(("",)))
            return RunTaken(in_use(self._run_name, None if found is None else found.record))
        return self._connection.call(lambda: damaged(self._client, self._keys, error))

    @contextmanager
    def _parsing(self) -> Iterator[None]:
        """While a reply is parsed: an invalid reply raises BufferDamaged with the name of its key."""
        try:
            yield
        except (ValueError, TypeError, KeyError, IndexError) as error:
            problem = error
        else:
            return
        raise self._connection.call(lambda: damaged(self._client, self._keys, problem)) from problem


def _chunks(tickets: Sequence[Ticket]) -> Iterator[list[Ticket]]:
    """Split tickets into chunks of at most `_ISSUE_CHUNK`, without splitting a group, even a larger one."""
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
    """Decode the trajectory of the ticket with this id. CodecError if it is missing or belongs to another ticket."""
    if not document:
        raise CodecError(f"missing trajectory of ticket {ticket}")
    trajectory = decode(document)
    if trajectory.ticket.id != ticket:
        raise CodecError(f"ticket {ticket} holds a trajectory of ticket {trajectory.ticket.id}")
    if trajectory.ticket.group_size != group_size:
        raise CodecError(
            f"ticket {ticket}: group size is {group_size}, its trajectory says {trajectory.ticket.group_size}"
        )
    return trajectory


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _short(reason: str) -> bytes:
    return reason[:_MAX_REASON_CHARS].encode(errors="replace")


def _json(value: Mapping[str, object]) -> bytes:
    return orjson.dumps(dict(value), option=orjson.OPT_SERIALIZE_NUMPY)


def _object(text: bytes) -> dict[str, object]:
    """Parse a JSON object. ValueError if it is something else."""
    found = orjson.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _natural(text: bytes) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(f"must be >= 0, got {number}")
    return number


def _per_stream(counts: Sequence[bytes]) -> dict[str, StreamStats]:
    """Parse `group_counts`: name and number, alternately."""
    number = {
        tuple(name.decode().split(" ")): int(count) for name, count in zip(counts[::2], counts[1::2], strict=True)
    }
    found = {}
    for stream in sorted({stream for stream, _ in number}):
        known, complete, cancelled = (number.get((stream, state), 0) for state in ("known", "complete", "cancelled"))
        found[stream] = StreamStats(known - complete - cancelled, complete, cancelled)
    return found
