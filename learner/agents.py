"""What the episodes of an update tell of the agent programs that played them, as named numbers for the metrics.

Invariants
- The figures come from stored episodes alone, so each episode counts once, in the update that trains on it.
- A run without agents has none of these figures; one with agents has all of them in every update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from services.schemas import Trajectory
from services.turns import short_states, turns_of

CUT_BY = ("gave_up", "crash", "timeout", "idle", "max_calls")
"""Why an agent's episode may have ended before its environment ended it."""


def agent_scalars(episodes: Sequence[Trajectory]) -> dict[str, float]:
    """The figures of the episodes that an agent program has played; empty without such episodes."""
    told = [(episode, about) for episode in episodes if (about := _about(episode))]
    if not told:
        return {}
    steps = [step for episode, _ in told for step in episode.steps]
    turns = sum(len(turns_of(episode.steps)) for episode, _ in told)

    def total(name: str) -> float:
        return sum(value for _, about in told if isinstance(value := about.get(name, 0), int | float))

    out = {
        "agent/calls": total("calls") / len(told),
        "agent/turns": turns / len(told),
        "agent/frozen_fraction": sum(not step.trained for step in steps) / max(len(steps), 1),
        "agent/extended_fraction": total("extended") / follows if (follows := total("follows")) else 1.0,
        "agent/unreadable_fraction": total("unreadable") / max(total("calls"), 1),
        "agent/short_anchor_fraction": sum(short_states(episode.steps) for episode, _ in told) / max(turns, 1),
        "agent/refused": total("refused"),
        "agent/orphaned": total("orphaned"),
        "agent/failed_attempts": total("failures"),
    }
    shares = {cause: sum(about["cause"] == cause for _, about in told) / len(told) for cause in CUT_BY}
    return {
        **out,
        "agent/truncated_fraction": sum(shares.values()),
        **{f"agent/truncated_{cause}": share for cause, share in shares.items()},
    }


def _about(episode: Trajectory) -> Mapping[str, object]:
    """What the gateway has noted of an episode; empty if a template played it."""
    about = episode.facts.get("agent")
    return about if isinstance(about, Mapping) and "cause" in about else {}
