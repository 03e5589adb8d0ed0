"""Report of an update: one flat record for the log, the metrics trackers and the dashboard."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from learner.agents import agent_scalars
from learner.prepare import PreparedUpdate
from services.schemas import Trajectory

SIZE_CLASSES = {"1": (1, 1), "2_to_4": (2, 4), "5_to_8": (5, 8), "9_up": (9, sys.maxsize)}
"""Smallest and largest size of each class of step groups; their shares of all step groups are recorded."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Time of an update in seconds.

    Attributes:
        wait: for groups.
        prepare: advantages and micro-batches.
        update: work of the ranks.
        publish: of the new version.
    """

    wait: float
    prepare: float
    update: float
    publish: float


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """One policy update.

    Attributes:
        update: number of the update, from 1, which is the policy version that it made.
        episodes: number of episodes trained on.
        success_rate: share of the episodes that were won.
        mean_reward: undiscounted reward of an episode.
        mean_steps: turns of an episode: steps of the environment.
        valid_fraction: share of turns whose action was valid.
        rows: number of trained calls: responses.
        trained_rows: number of those that could move the policy.
        response_tokens: of all rows.
        step_group_sizes: number of step groups of each size.
        step_group_size_mean: over step groups.
        advantage_deviation: standard deviation of the rows' advantages.
        cut_fraction: share of responses that ended at the sampling limit.
        staleness_mean: over groups, in updates.
        staleness_max: over groups, in updates.
        dropped_stale: groups since the update before that were too old.
        dropped_equal: groups since the update before with equal rewards.
        dropped_unreadable: groups since the update before that could not be read.
        cancelled: groups since the update before that were cancelled.
        tokens_per_second: prompt and response tokens through the model per second of the ranks' work.
        timings: seconds of the update's parts.
        loss: metrics of the ranks, averaged over the tokens trained on.
        prompt_truncated: share of prompts that were shortened to fit.
        calls_per_turn: trained calls of a turn.
        agents: figures of agent programs, by the name of the metric; empty without them.
    """

    update: int
    episodes: int
    success_rate: float
    mean_reward: float
    mean_steps: float
    valid_fraction: float
    rows: int
    trained_rows: int
    response_tokens: int
    step_group_sizes: dict[int, int]
    step_group_size_mean: float
    advantage_deviation: float
    cut_fraction: float
    staleness_mean: float
    staleness_max: int
    dropped_stale: int
    dropped_equal: int
    dropped_unreadable: int
    cancelled: int
    tokens_per_second: float
    timings: Timings
    loss: dict[str, float]
    prompt_truncated: float = 0.0
    calls_per_turn: float = 1.0
    agents: dict[str, float] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """The report as named numbers."""
        out = {
            "rollout/success_rate": self.success_rate,
            "rollout/mean_reward": self.mean_reward,
            "rollout/mean_steps": self.mean_steps,
            "rollout/valid_fraction": self.valid_fraction,
            "rollout/cut_fraction": self.cut_fraction,
            "rollout/prompt_truncated": self.prompt_truncated,
            "rollout/episodes": self.episodes,
            "advantage/step_group_size": self.step_group_size_mean,
            "advantage/deviation": self.advantage_deviation,
            "staleness/mean": self.staleness_mean,
            "staleness/max": self.staleness_max,
            "staleness/dropped_groups": self.dropped_stale,
            "dispatch/equal_reward_groups": self.dropped_equal,
            "dispatch/unreadable_groups": self.dropped_unreadable,
            "dispatch/cancelled_groups": self.cancelled,
            "update/rows": self.rows,
            "update/trained_rows": self.trained_rows,
            "update/response_tokens": self.response_tokens,
            "time/tokens_per_second": self.tokens_per_second,
        }
        out |= {f"time/{name}_s": getattr(self.timings, name) for name in ("wait", "prepare", "update", "publish")}
        if self.agents or self.calls_per_turn != 1.0:
            out["agent/calls_per_turn"] = self.calls_per_turn
        out |= self.agents
        groups = sum(self.step_group_sizes.values())
        for name, (low, high) in SIZE_CLASSES.items():
            of_class = sum(count for size, count in self.step_group_sizes.items() if low <= size <= high)
            out[f"advantage/step_groups_{name}"] = of_class / groups
        out |= {f"loss/{name}": value for name, value in self.loss.items()}
        return {name: float(value) for name, value in out.items()}


def describe(
    update: int,
    groups: Mapping[int, Sequence[Trajectory]],
    prepared: PreparedUpdate,
    *,
    dropped_stale: int,
    dropped_equal: int,
    dropped_unreadable: int,
    cancelled: int,
    timings: Timings,
    loss: dict[str, float],
) -> UpdateReport:
    """Build the report of an update.

    Args:
        update: number of the update.
        groups: that it trained on, by number.
        prepared: from these groups.
        dropped_stale: see `UpdateReport`; so are the next three.
        dropped_equal: see there.
        dropped_unreadable: see there.
        cancelled: see there.
        timings: seconds of the update's parts.
        loss: metrics of the ranks.
    """
    episodes = [trajectory for group in groups.values() for trajectory in group]
    calls = [step for trajectory in episodes for step in trajectory.steps if step.trained]
    turns = len(prepared.table)
    ages = [staleness(update - 1, group) for group in groups.values()]
    sizes = prepared.step_group_sizes
    return UpdateReport(
        update=update,
        episodes=len(episodes),
        success_rate=sum(episode.won for episode in episodes) / len(episodes),
        mean_reward=sum(episode.reward for episode in episodes) / len(episodes),
        mean_steps=turns / len(episodes),
        valid_fraction=int(prepared.table.valid.sum()) / turns,
        rows=prepared.rows,
        trained_rows=prepared.trained_rows,
        response_tokens=prepared.response_tokens,
        step_group_sizes=dict(sorted(Counter(sizes.tolist()).items())),
        step_group_size_mean=float(sizes.mean()),
        advantage_deviation=prepared.advantage_deviation,
        prompt_truncated=sum(step.prompt_truncated for step in calls) / len(calls),
        calls_per_turn=len(calls) / turns,
        agents=agent_scalars(episodes),
        cut_fraction=prepared.cut_fraction,
        staleness_mean=sum(ages) / len(ages),
        staleness_max=max(ages),
        dropped_stale=dropped_stale,
        dropped_equal=dropped_equal,
        dropped_unreadable=dropped_unreadable,
        cancelled=cancelled,
        tokens_per_second=prepared.tokens / max(timings.update, 1e-9),
        timings=timings,
        loss=loss,
    )


def staleness(version: int, group: Sequence[Trajectory]) -> int:
    """The learner's version minus the oldest version that wrote a token of the group; at least 0.

    After a resumption a group may come from a version that was lost: newer than the learner's, so not stale.

    Example: version 7 and tokens of versions 5 and 6 give 2; version 7 and tokens of version 9 give 0.
    """
    return max(0, version - min(trajectory.oldest_version for trajectory in group))
