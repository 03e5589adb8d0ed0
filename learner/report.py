"""What the trainer tells about an update: one flat record for the log, TensorBoard and the dashboard."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from learner.prepare import PreparedUpdate
from services.schemas import Trajectory

SIZE_CLASSES = {"1": (1, 1), "2_to_4": (2, 4), "5_to_8": (5, 8), "9_up": (9, sys.maxsize)}
"""Classes of step-group sizes whose shares of all step groups are recorded."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: waiting for groups, advantages and batches, the ranks' work, and making the version public."""

    wait: float
    prepare: float
    update: float
    publish: float


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """One policy update.

    Attributes:
        update: its number from 1, which is the policy version that it made.
        episodes: trained on. success_rate: share of them that won. mean_reward: undiscounted.
        mean_steps: per episode. valid_fraction: of all steps.
        rows / trained_rows: steps, and those that could move the policy. response_tokens: of all rows.
        step_group_sizes: number of step groups of each size. step_group_size_mean: over step groups.
        staleness_mean / staleness_max: over groups, in updates.
        dropped_stale / dropped_equal / dropped_unreadable / cancelled: groups, since the update before.
        prompt_truncated: share of the prompts from which something was left out for want of room.
        loss: metrics of the ranks, averaged over the tokens trained on.
        tokens_per_second: prompt and response tokens that went through the model over the ranks' seconds.
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

    def scalars(self) -> dict[str, float]:
        """The record as named numbers."""
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
    """The report of update number `update`, which trained on these groups."""
    episodes = [trajectory for group in groups.values() for trajectory in group]
    steps = [step for trajectory in episodes for step in trajectory.steps]
    ages = [staleness(update - 1, group) for group in groups.values()]
    sizes = prepared.step_group_sizes
    return UpdateReport(
        update=update,
        episodes=len(episodes),
        success_rate=sum(episode.won for episode in episodes) / len(episodes),
        mean_reward=sum(episode.reward for episode in episodes) / len(episodes),
        mean_steps=len(steps) / len(episodes),
        valid_fraction=sum(step.valid for step in steps) / len(steps),
        rows=prepared.rows,
        trained_rows=prepared.trained_rows,
        response_tokens=prepared.response_tokens,
        step_group_sizes=dict(sorted(Counter(sizes.tolist()).items())),
        step_group_size_mean=float(sizes.mean()),
        advantage_deviation=prepared.advantage_deviation,
        prompt_truncated=sum(step.prompt_truncated for step in steps) / len(steps),
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
    """The learner's version less the oldest version that wrote a token of the group; at least 0.

    After a resumption a group may come from a version that was lost: it is newer than the learner, and not stale.
    """
    return max(0, version - min(trajectory.oldest_version for trajectory in group))
