"""Keeps a run that has lost its name from announcing weights.

A run may lose its name while a version travels: its process was stopped for longer than its lease, or Redis was out of
its reach. What it announced then would be read by the actors of the run that owns the name by now.

Invariants
- A collective channel announces by the script that checks the owner, in one step.
- Other channels keep their announcements outside Redis: they check the owner immediately before. Where the announcement
  is a process, the numbers of the owners decide there a second time (`services.weights.ray_store`).
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from services.buffer.owner import Owner, number_of
from services.config.tree import BufferConfig


@dataclass(frozen=True)
class Fence:
    """What a publisher needs to prove that its run still owns its name. Plain data, so that ranks can have it too.

    Attributes:
        redis_url: address of the run's Redis; it may hold a password.
        run: name of the run.
        config: limits and timeouts of the connection.
        owner: of the run's name.
    """

    redis_url: str
    run: str
    config: BufferConfig
    owner: Owner

    def __repr__(self) -> str:
        return f"Fence({self.run!r}, {self.owner.token!r})"

    @property
    def number(self) -> int:
        """Number of the owner: later owners have higher ones."""
        return number_of(self.owner.token)

    def check(self) -> None:
        """Raise RunTaken if another process owns the run by now, RedisUnavailable if that cannot be told."""
        from services.buffer import Buffer

        with closing(Buffer.connect(self.redis_url, self.run, self.config, owner=self.owner)) as buffer:
            buffer.check_owner()
