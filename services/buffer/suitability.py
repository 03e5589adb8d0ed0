"""Check whether a Redis that the run did not start can hold it: before anything is stored, and while the run goes.

An error: a setting that would lose data without an error, or stall the run later. A warning: a setting that costs more
work after a failure.

Invariants
- INFO is enough. If it is forbidden, CONFIG is read; if that is forbidden too, a warning says what is unknown.
- With a memory limit only the policies `noeviction` and `volatile-*` are accepted: a run's keys have no time to live,
  so the latter cannot evict them. Any other policy may.
- Redis needs memory beyond the stored data: the run may store `SHARE` of the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from redis import exceptions

from services.buffer.connection import Connection
from services.errors import RedisUnavailable, RedisUnsuitable, first_line

OLDEST = (6, 2)
"""The oldest Redis that the tests run against."""
MIB = 2**20
SHARE = 0.8
"""Share of `maxmemory` for the run's trajectories."""


def check_server(connection: Connection, max_mib: int) -> list[str]:
    """Warnings about the Redis, one line each.

    Args:
        connection: to the Redis.
        max_mib: how much the run may store, in MiB.

    Raises:
        RedisUnsuitable: it evicts, is a replica or part of a cluster, too old, or too small.
    """
    where = f"Redis at {connection.where}"
    facts = _facts(connection)
    if facts is None:
        return [f"{where} lets this user read neither INFO nor CONFIG: unknown whether it evicts or persists data"]
    for check in (_version, _cluster, _role, _eviction, _room):
        problem = check(facts, max_mib)
        if problem is not None:
            raise RedisUnsuitable(f"{where} {problem}")
    found = (_policy(facts), _persistence(facts))
    return [f"{where} {line}" for line in found if line is not None]


def evicts(connection: Connection) -> str | None:
    """Why the Redis may now evict data, None if it does not: its settings can change at any time."""
    facts = _facts(connection)
    problem = None if facts is None else _eviction(facts, 0)
    return None if problem is None else f"Redis at {connection.where} {problem}"


def _facts(connection: Connection) -> Mapping[str, Any] | None:
    """The reply of INFO, or the part of it that CONFIG knows; None if both are forbidden."""
    queries: tuple[Callable[[], Mapping[str, Any]], ...] = (
        lambda: connection.client.info(),
        lambda: _as_info(connection.client.config_get("maxmemory*"), connection.client.config_get("appendonly")),
    )
    for query in queries:
        try:
            return connection.call(query)
        except RedisUnavailable as error:
            if not isinstance(error.__cause__, exceptions.NoPermissionError):
                raise
        except exceptions.ResponseError as error:  # renamed or disabled, as managed services do
            if "unknown command" not in first_line(error).lower():
                raise RedisUnavailable(f"Redis at {connection.where}: {first_line(error)}") from error
    return None


def _as_info(memory: Any, appendonly: Any) -> Mapping[str, Any]:
    settings = {_text(name): _text(value) for name, value in [*memory.items(), *appendonly.items()]}
    info: dict[str, Any] = {}
    if "maxmemory" in settings:
        info["maxmemory"] = settings["maxmemory"]
    if "maxmemory-policy" in settings:
        info["maxmemory_policy"] = settings["maxmemory-policy"]
    if "appendonly" in settings:
        info["aof_enabled"] = int(settings["appendonly"] == "yes")
    return info


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _version(facts: Mapping[str, Any], _: int) -> str | None:
    parts = str(facts.get("redis_version", "")).split(".")
    if len(parts) < 2 or not all(part.isdecimal() for part in parts[:2]):
        return None  # another server with the protocol of Redis and versions of its own
    if (int(parts[0]), int(parts[1])) >= OLDEST:
        return None
    return f"has version {'.'.join(parts)}; use {OLDEST[0]}.{OLDEST[1]} or newer"


def _cluster(facts: Mapping[str, Any], _: int) -> str | None:
    if not int(facts.get("cluster_enabled", 0)):
        return None
    return (
        "is a node of a Redis Cluster, which the buffer does not support; name a Redis of its own in buffer.redis_url"
    )


def _role(facts: Mapping[str, Any], _: int) -> str | None:
    if facts.get("role") not in ("slave", "replica"):
        return None
    return "is a replica; name the primary in buffer.redis_url"


def _eviction(facts: Mapping[str, Any], _: int) -> str | None:
    policy = str(facts.get("maxmemory_policy", ""))
    if not _limit(facts) or policy in ("", "noeviction") or policy.startswith("volatile-"):
        return None
    return (
        f"has maxmemory-policy {policy}: when its memory is full it may delete tickets and trajectories without an "
        "error; set maxmemory-policy noeviction"
    )


def _room(facts: Mapping[str, Any], max_mib: int) -> str | None:
    limit = _limit(facts)
    most = int(SHARE * limit) // MIB
    if not limit or max_mib <= most:
        return None
    fits = f"set buffer.max_mib={most} (a fifth of the memory is left to Redis itself) or " if most else ""
    return f"has maxmemory {limit / MIB:.0f} MiB, but the run may store {max_mib} MiB; {fits}give it more memory"


def _policy(facts: Mapping[str, Any]) -> str | None:
    policy = str(facts.get("maxmemory_policy", ""))
    if not _limit(facts) or policy == "noeviction":
        return None
    if not policy:
        return "does not report its maxmemory-policy; make sure that it is noeviction"
    return f"has maxmemory-policy {policy}, which does not evict a run's keys; noeviction would be clearer"


def _persistence(facts: Mapping[str, Any]) -> str | None:
    if "aof_enabled" not in facts:
        return "does not report whether it writes an append-only file"
    if int(facts["aof_enabled"]):
        failed = facts.get("aof_last_write_status", "ok") != "ok"
        return "cannot write its append-only file; is its disk full?" if failed else None
    return (
        "writes no append-only file (appendonly no): if it dies, everything since its last snapshot is lost and is "
        "played again"
    )


def _limit(facts: Mapping[str, Any]) -> int:
    """Memory limit in bytes, 0 for none."""
    return int(facts.get("maxmemory", 0) or 0)
