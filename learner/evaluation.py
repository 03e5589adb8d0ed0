"""Evaluation panels: the same tasks with the same seeds every time, played by whatever policy the actors serve.

A rate's interval is Wilson's (JASA 22, 1927). Several episodes of one task are not independent: with `evaluation.seeds`
it is Wilson's for the effective number of episodes n / d, where the design effect d is the variance of the rate over
that of n independent episodes. The variance is that between tasks, as of clusters in a survey (Korn and Graubard,
Survey Methodology 24, 1998; with Wilson's interval: Franco et al., J. Survey Statistics and Methodology 7, 2019).

Invariants
- Runs in a stream of its own, so it may go on while training does, and leaves nothing of it in the buffer.
- Seeds depend on the task's place in the panel alone: two evaluations of a run are paired.
- Each of several splits has panels and figures of its own.
- Cancelled episodes (an environment that failed) are counted apart and are no result.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from learner.dispatch import ticket_seed
from services.buffer import Buffer
from services.codec import CodecError
from services.config.tree import Config
from services.errors import RunStalled
from services.schemas import Ticket, Trajectory
from services.tasks import split_tasks

Key = TypeVar("Key", int, str)

POLL_S = 0.5
READ_ATTEMPTS = 3
Z_95 = 1.959963984540054

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rate:
    """`won` of `episodes`, with the Wilson 95 % interval of the rate.

    `effective`: as how many independent episodes they count, where they are not all independent.
    """

    won: int
    episodes: int
    effective: float | None = None

    @property
    def value(self) -> float:
        return self.won / self.episodes if self.episodes else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end; (0, 1) without episodes."""
        if not self.episodes:
            return 0.0, 1.0
        n, rate, z2 = self.effective or self.episodes, self.value, Z_95**2
        centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
        half = Z_95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference of two rates with its 95 % interval."""

    value: float
    low: float
    high: float


def difference(after: Rate, before: Rate) -> Difference:
    """`after − before`, interval by Newcombe's method 10 (Statistics in Medicine 17, 1998): from both Wilson intervals.

    The pairing of the panel is not used, so the interval is on the wide side.
    """
    (low_a, high_a), (low_b, high_b) = after.interval, before.interval
    gain = after.value - before.value
    down = math.hypot(after.value - low_a, high_b - before.value)
    up = math.hypot(high_a - after.value, before.value - low_b)
    return Difference(gain, gain - down, gain + up)


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean of `count` values with its standard error; NaN without values."""

    value: float
    error: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """Normal 95 % interval."""
        return self.value - Z_95 * self.error, self.value + Z_95 * self.error


def mean(values: Sequence[float]) -> Mean:
    count = len(values)
    if not count:
        return Mean(math.nan, math.nan, 0)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return Mean(statistics.fmean(values), error, count)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an episode of a panel came to. `score` is the environment's, None where it has none.

    `task` is the task's number in the panels of all splits, `seed` that of the episode among the task's.
    """

    panel: int
    task_type: str
    won: bool
    score: float | None
    steps: int
    valid: int
    task: int
    seed: int = 0
    split: str = ""

    @classmethod
    def of(cls, ticket: Ticket, facts: Mapping[str, object], config: Config, *, steps: int, valid: int) -> Outcome:
        """Of the episode that was played for a panel's ticket, by the environment's facts."""
        score = facts.get("score")
        seed, task = divmod(ticket.group, _numbers(config) * max(1, len(config.evaluation.splits)))
        return cls(
            panel=task % _numbers(config) // config.evaluation.episodes,
            task_type=str(facts.get("task_type", "")),
            won=bool(facts.get("won", False)),
            score=float(score) if isinstance(score, int | float) else None,
            steps=steps,
            valid=valid,
            task=task,
            seed=seed,
            split=ticket.task.split,
        )


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What a policy's panels showed.

    Attributes:
        stream: its name. split: of its tasks; of several the names, with commas.
        version: the policy it was asked for; None: whatever was served.
        success: over all finished episodes. panels, seeds: the same by panel and by seed. task_types: by `task_type`.
        score: of the environment's `score`; None where it has none. mean_steps: per episode. valid_fraction: of steps.
        oldest_version / newest_version: of the policy that played, None without episodes.
        cancelled: episodes that could not be played. complete: the panels were not cut short by a stop.
        splits: the result of each split by itself, where several were asked for.
    """

    stream: str
    split: str
    version: int | None
    success: Rate
    panels: tuple[Rate, ...]
    seeds: tuple[Rate, ...]
    score: Mean | None
    task_types: dict[str, Rate]
    mean_steps: float
    valid_fraction: float
    oldest_version: int | None
    newest_version: int | None
    cancelled: int
    complete: bool
    splits: Mapping[str, EvaluationResult] = field(default_factory=dict)

    def scalars(self, prefix: str = "evaluation") -> dict[str, float]:
        """The record as named numbers; those of each of several splits also as `evaluation/SPLIT/NAME`."""
        low, high = self.success.interval
        own = {
            f"{prefix}/success_rate": self.success.value,
            f"{prefix}/success_low": low,
            f"{prefix}/success_high": high,
            f"{prefix}/mean_score": self.success.value if self.score is None else self.score.value,
            f"{prefix}/mean_steps": self.mean_steps,
            f"{prefix}/valid_fraction": self.valid_fraction,
        }
        for split, result in self.splits.items():
            own |= result.scalars(f"{prefix}/{split}")
        return own


def panel(config: Config, splits: Mapping[str, int], stream: str) -> list[Ticket]:
    """The tickets of all panels: groups of one, the tasks of `split_tasks` once for each seed.

    Raises:
        EnvironmentUnavailable: the environment has no such split, or too few tasks for the panels.
    """
    parts, every = split_tasks(config, splits), _numbers(config)
    return [
        Ticket(
            stream=stream,
            group=group,
            member=0,
            group_size=1,
            task=task,
            seed=ticket_seed(config.run.seed, "evaluation", group, 0),
            temperature=config.evaluation.temperature,
        )
        for seed in range(config.evaluation.seeds)
        for place, tasks in enumerate(parts)
        for group, task in enumerate(tasks, start=(seed * len(parts) + place) * every)
    ]


def _numbers(config: Config) -> int:
    """How many numbers the tasks of one split's panels have."""
    return config.evaluation.episodes * config.evaluation.panels


def evaluate(
    config: Config,
    buffer: Buffer,
    env_splits: Mapping[str, int],
    *,
    stream: str,
    version: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationResult:
    """Play the panel in `stream` and sum it up. Blocks; `on_progress` gets (episodes ended, episodes).

    Raises:
        EnvironmentUnavailable: the environment has no such split, or too few tasks for the panels.
        RunStalled: no episode ended for `learner.group_timeout_s`, or every one of them was cancelled.
    """
    tickets = panel(config, env_splits, stream)
    buffer.remove(stream, sorted(buffer.known(stream)))
    buffer.issue(tickets)
    try:
        for _ in range(READ_ATTEMPTS):
            wait_for_episodes(buffer, stream, tickets, config.learner.group_timeout_s, should_stop, on_progress)
            played, damaged = _read(buffer, stream, tickets)
            if not damaged or should_stop():
                break
            buffer.remove(stream, damaged)
            buffer.issue([ticket for ticket in tickets if ticket.group in damaged])
        else:
            raise RunStalled(
                f"evaluation {stream}: {len(damaged)} episodes could not be read, played {READ_ATTEMPTS} times; "
                "do the actors run this release of the code?"
            )
        reasons = buffer.cancelled(stream)
    finally:
        buffer.remove(stream, [ticket.group for ticket in tickets])
    if reasons and not played:
        raise RunStalled(f"evaluation {stream}: no episode could be played; {next(iter(reasons.values()))}")
    versions = [span.version for episode in played for step in episode.steps for span in step.versions]
    result = summarise_splits(
        config,
        [_outcome(episode, config) for episode in played],
        tickets,
        stream=stream,
        version=version,
        served=(min(versions, default=None), max(versions, default=None)),
        cancelled=set(reasons),
    )
    return replace(result, complete=len(played) + len(reasons) == len(tickets))


def summarise_splits(
    config: Config,
    outcomes: Sequence[Outcome],
    tickets: Sequence[Ticket],
    *,
    stream: str,
    version: int | None = None,
    served: tuple[int | None, int | None] = (None, None),
    cancelled: Collection[int] = (),
) -> EvaluationResult:
    """Sum up the episodes of all splits, and of each by itself; `cancelled` are the groups that were."""
    split_of = {ticket.group: ticket.task.split for ticket in tickets}

    def part(name: str, chosen: Sequence[Outcome], lost: int) -> EvaluationResult:
        return summarise(chosen, stream=stream, split=name, version=version, served=served, cancelled=lost)

    named = config.evaluation.splits
    whole = part(", ".join(named) or tickets[0].task.split, outcomes, len(cancelled))
    if len(named) < 2:
        return whole
    parts = {
        name: part(
            name,
            [outcome for outcome in outcomes if outcome.split == name],
            sum(split_of[group] == name for group in cancelled),
        )
        for name in named
    }
    return replace(whole, splits=parts)


def summarise(
    outcomes: Sequence[Outcome],
    *,
    stream: str,
    split: str,
    version: int | None = None,
    served: tuple[int | None, int | None] = (None, None),
    cancelled: int = 0,
    complete: bool = True,
) -> EvaluationResult:
    """Sum up episodes; `served` are the oldest and the newest policy version that played them."""
    by_type = _grouped(outcomes, lambda outcome: outcome.task_type)
    by_panel = _grouped(outcomes, lambda outcome: outcome.panel)
    by_seed = _grouped(outcomes, lambda outcome: outcome.seed)
    steps = sum(outcome.steps for outcome in outcomes)
    scored = _grouped([o for o in outcomes if o.score is not None], lambda outcome: outcome.task)
    scores = [statistics.fmean(o.score or 0.0 for o in episodes) for episodes in scored.values()]
    return EvaluationResult(
        stream=stream,
        split=split,
        version=version,
        success=_rate(outcomes),
        panels=tuple(_rate(by_panel[number]) for number in sorted(by_panel)),
        seeds=tuple(_rate(by_seed[number]) for number in sorted(by_seed)),
        score=mean(scores) if scores else None,
        task_types={name: _rate(episodes) for name, episodes in sorted(by_type.items()) if name},
        mean_steps=steps / len(outcomes) if outcomes else math.nan,
        valid_fraction=sum(outcome.valid for outcome in outcomes) / steps if steps else math.nan,
        oldest_version=served[0],
        newest_version=served[1],
        cancelled=cancelled,
        complete=complete,
    )


def wait_for_episodes(
    buffer: Buffer,
    stream: str,
    tickets: Sequence[Ticket],
    timeout_s: float,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int, int], None] = lambda ended, total: None,
) -> None:
    """Wait until every episode of the stream has ended, or for a stop.

    Raises:
        RunStalled: none ended for `timeout_s`.
    """
    total, before, quiet_since = len(tickets), -1, time.monotonic()
    while True:
        buffer.expire()  # as at the intake of groups: no actor may be alive to do it
        ended = len(buffer.complete(stream)) + len(buffer.cancelled(stream))
        if ended != before:
            before, quiet_since = ended, time.monotonic()
            on_progress(ended, total)
        if ended >= total or should_stop():
            return
        if time.monotonic() - quiet_since > timeout_s:
            raise RunStalled(
                f"evaluation {stream}: no episode ended for {timeout_s:g} s ({ended} of {total} have); "
                "are the rollout actors and the environment server up?"
            )
        if not buffer.wait(stream, POLL_S):
            # Issuing again is a no-op, unless Redis has lost tickets.
            known = buffer.known(stream)
            buffer.issue([ticket for ticket in tickets if ticket.group not in known])


def _read(buffer: Buffer, stream: str, tickets: Sequence[Ticket]) -> tuple[list[Trajectory], list[int]]:
    """The episodes that have ended and that Redis has not lost since, and the groups that cannot be read."""
    played: list[Trajectory] = []
    damaged: list[int] = []
    asked = {ticket.group: ticket for ticket in tickets}
    for group in buffer.complete(stream):
        try:
            found = buffer.read(stream, group)
            if [trajectory.ticket for trajectory in found] != [asked.get(group)]:
                raise CodecError("it was played for another ticket")
        except KeyError:
            continue
        except CodecError as error:
            log.warning("episode %s/%d cannot be read and is played again: %s", stream, group, error)
            damaged.append(group)
            continue
        played += found
    return played, damaged


def _outcome(episode: Trajectory, config: Config) -> Outcome:
    valid = sum(step.valid for step in episode.steps)
    return Outcome.of(episode.ticket, episode.facts, config, steps=len(episode.steps), valid=valid)


def _grouped(outcomes: Sequence[Outcome], key: Callable[[Outcome], Key]) -> dict[Key, list[Outcome]]:
    grouped = defaultdict[Key, list[Outcome]](list)
    for outcome in outcomes:
        grouped[key(outcome)].append(outcome)
    return grouped


def _rate(outcomes: Sequence[Outcome]) -> Rate:
    tasks = _grouped(outcomes, lambda outcome: outcome.task)
    counts = [(sum(outcome.won for outcome in episodes), len(episodes)) for episodes in tasks.values()]
    won, played = sum(won for won, _ in counts), len(outcomes)
    return Rate(won, played, None if len(tasks) == played else effective_episodes(counts))


def effective_episodes(tasks: Sequence[tuple[int, int]]) -> float:
    """As how many independent episodes those of several tasks count, each task's (won, played) given.

    At least one a task, at most all of them. Where nothing was won, or all, nothing tells a task's episodes apart: one.
    """
    won, played, count = sum(won for won, _ in tasks), sum(played for _, played in tasks), len(tasks)
    rate = won / played
    if count < 2 or won in (0, played):
        return float(count)
    between = count / (count - 1) * sum((won - rate * played) ** 2 for won, played in tasks) / played**2
    independent = rate * (1 - rate) / (played - 1)
    return min(float(played), max(float(count), played * independent / between)) if between else float(played)
