"""The Redis keys of a run and the format of tickets and groups inside them. The only file that knows key names.

Invariants
- Every key contains the hash tag `{run}`, so that all keys of a run are in one slot. A script declares every key that
  it accesses.
- A ticket's field sorts, as bytes, in the order in which tickets are leased: evaluation streams first, then stream,
  group, member. A group's field is that of its tickets without the member.

Example:
    0 eval-000040 000000000000 000003    member 3 of group 0 of an evaluation
    1 train 000000000007 000000          member 0 of training group 7
    1 train 000000000007                 training group 7
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from services.schemas import TRAIN_STREAM, Ticket

KINDS: Mapping[str, str] = {
    "queue": "zset",  # all scores 0: fields of waiting tickets
    "leases": "zset",  # ticket field, score: end of its lease (ms of the run's clock)
    "holders": "hash",  # ticket field -> actor
    "tickets": "hash",  # ticket field -> JSON, from issue until its group is complete, cancelled or removed
    "attempts": "hash",  # ticket field -> failed attempts
    "given_up": "hash",  # ticket field -> why its group continues without it
    "trajectories": "hash",  # ticket field -> encoded trajectory
    "bytes": "string",  # integer: size of all trajectories in bytes
    "sizes": "hash",  # group field -> group size; one entry per known group, in any state
    "counts": "hash",  # group field -> stored trajectories; present once an actor has leased one of its tickets
    "begun": "string",  # the last field of the training groups that have begun
    "complete": "zset",  # all scores 0: fields of complete groups
    "reasons": "hash",  # group field -> why it was cancelled
    "closed": "zset",  # field of a complete or cancelled group, score: sequence of that event
    "group_counts": "hash",  # `<stream> known|complete|cancelled` -> number of groups; none is 0
    "sequence": "string",  # integer: of the last completion or cancellation; grows even after Redis has lost its data
    "changed": "hash",  # stream -> sequence of its last completion or cancellation
    "actors": "hash",  # actor -> JSON of its last heartbeat
    "actor_deadlines": "zset",  # actor, score: when its heartbeat expires (ms of the run's clock)
    "actor_heard": "hash",  # actor -> time of its last heartbeat (ms of the run's clock)
    "manifest": "string",
    "state": "string",
    "metrics": "stream",  # capped
    "commands": "hash",  # id -> JSON of a command that people sent to the run
    "command_order": "list",  # ids of commands, oldest first
    "answers": "hash",  # id of a command -> JSON of its answer
    "desired_actors": "string",  # integer: requested number of rollout actors
    "weights_announced": "string",  # JSON: the newest policy version of a collective weight channel
    "weights_wishes": "hash",  # reader -> JSON of its request for a version
    "weights_round": "string",  # JSON: the latest transfer round
    "card": "hash",  # turn on a shared card: `number`, `holder`, `id`, `phase`, `ends`, `wanted` (both ms of its clock)
    "clock": "hash",  # `server`: time of Redis when it was read last, `steady`: the run's own time then (both ms)
    "owner": "hash",  # who runs the run: `token`, `lineage`, `record` (JSON), `beats`, `released`
}
"""Redis type of each key of a run."""

NAMES = tuple(KINDS)

MAX_GROUP_SIZE = 4096
"""A script passes all tickets of a group to one command; Lua allows some 8,000 arguments."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_GROUP_DIGITS = 12
_MEMBER_DIGITS = 6


class Keys:
    """Key names of one run. ValueError if `run` is not a plain name."""

    def __init__(self, run: str) -> None:
        self._prefix = "anchorage:{" + _checked(run, "run") + "}:"

    def __getitem__(self, name: str) -> str:
        """Key of one of `NAMES`."""
        return self._prefix + NAMES[NAMES.index(name)]

    @property
    def pattern(self) -> str:
        """Pattern of every key of the run, for SCAN and `redis-cli --pattern`."""
        return f"{self._prefix}*"

    def of(self, names: Sequence[str]) -> list[str]:
        """Keys of some of `NAMES`."""
        return [self[name] for name in names]


def named_in(lua: str) -> list[str]:
    """The keys that a script mentions in capitals, in the order in which `bindings` binds them."""
    words = set(re.findall(r"\b[A-Z_]+\b", lua))
    return [name for name in NAMES if name.upper() in words]


def bindings(names: Sequence[str]) -> str:
    """Lua that binds keys to their names in capitals, for the top of a script."""
    return "".join(f"local {name.upper()} = KEYS[{index}]\n" for index, name in enumerate(names, start=1))


def group_field(stream: str, group: int) -> str:
    """`<0|1> <stream> <group, 12 digits>`. A blank sorts before every character of a stream's name."""
    if not 0 <= group < 10**_GROUP_DIGITS:
        raise ValueError(f"group {group} is out of range")
    return f"{stream_prefix(stream)}{group:0{_GROUP_DIGITS}d}"


def ticket_field(stream: str, group: int, member: int) -> str:
    """The group's field, a blank, and the member in 6 digits."""
    if not 0 <= member < 10**_MEMBER_DIGITS:
        raise ValueError(f"member {member} is out of range")
    return f"{group_field(stream, group)} {member:0{_MEMBER_DIGITS}d}"


def field_of(ticket: Ticket) -> str:
    """The field of a ticket."""
    return ticket_field(ticket.stream, ticket.group, ticket.member)


def field_of_id(ticket_id: str) -> str:
    """The field of the ticket with this id (`stream/group/member`). ValueError if it is not an id."""
    parts = ticket_id.split("/")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts[1:]):
        raise ValueError(f"'{ticket_id}' is not a ticket id")
    return ticket_field(parts[0], int(parts[1]), int(parts[2]))


def stream_prefix(stream: str) -> str:
    """The prefix of the fields of a stream's groups."""
    return f"{int(stream == TRAIN_STREAM)} {_checked(stream, 'stream')} "


def stream_range(stream: str) -> tuple[str, str]:
    """Bounds of a stream's group fields, for lexicographic range queries."""
    prefix = stream_prefix(stream)
    return f"[{prefix}", f"({prefix}~"


def parse_group(field: bytes) -> tuple[str, int]:
    """Stream and group of a group's field."""
    _, stream, group = field.decode().split(" ")
    return stream, int(group)


def groups_of(stream: str, fields: Iterable[bytes]) -> Iterator[int]:
    """Numbers of the groups among `fields` that belong to the stream. ValueError if one of them has no number."""
    prefix = stream_prefix(stream).encode()
    return (int(field[-_GROUP_DIGITS:]) for field in fields if field.startswith(prefix))


def split_ticket(field: bytes) -> tuple[bytes, int]:
    """The group's field and the member of a ticket's field."""
    group, _, member = field.rpartition(b" ")
    return group, int(member)


def _checked(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"'{name}' is not a {what} name: letters, digits, '.', '_' and '-' only")
    return name
