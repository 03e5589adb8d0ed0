"""Trajectories that no model played, for tests of what the learner does with them."""

from __future__ import annotations

import numpy as np

from services.schemas import Step, Ticket, Trajectory, VersionSpan


def play(ticket: Ticket, version: int = 0, *, vocabulary: int = 64, steps: int | None = None) -> Trajectory:
    """An episode whose content depends on the ticket alone; `version` wrote all of it."""
    rng = np.random.default_rng([ticket.group, ticket.member, ticket.seed])
    count = steps or int(rng.integers(1, 5))
    won = bool(rng.random() < 0.5)
    played = []
    for number in range(count):
        length = int(rng.integers(1, 4))
        played.append(
            Step(
                prompt_ids=rng.integers(0, vocabulary, int(rng.integers(3, 12))).astype(np.int32),
                response_ids=rng.integers(0, vocabulary, length).astype(np.int32),
                logprobs=rng.uniform(-6, -2, length).astype(np.float32),
                versions=(VersionSpan(version, length),),
                anchor=f"room {int(rng.integers(0, 3))}",
                observation="a room",
                prompt="",
                response="look",
                action="look",
                reward=10.0 if won and number == count - 1 else 0.0,
                valid=bool(rng.random() < 0.8),
                terminated=won and number == count - 1,
            )
        )
    return Trajectory(ticket=ticket, steps=tuple(played), facts={"won": won, "score": float(won), "task_type": "look"})


class Publishing:
    """Base of ranks without processes: they publish their `weights` at once."""

    def publish(self, version, channel):
        channel.publish(version, self.weights())

    def published(self):
        return True

    def rest(self):
        pass

    def export(self, folder):
        folder.mkdir(exist_ok=True)
