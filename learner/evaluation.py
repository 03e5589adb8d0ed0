"""Evaluation panels: the same tasks with the same seeds every time, played by the policy that the actors serve.

The interval of a rate is Wilson's (JASA 22, 1927). Episodes of the same task are not independent: with
`evaluation.seeds` the interval is Wilson's for the effective number of episodes n / d, where the design effect d is the
variance of the rate divided by that of n independent episodes. The variance is that between tasks, as between clusters
in a survey (Korn and Graubard, Survey Methodology 24, 1998; with Wilson's interval: Franco et al., J. Survey Statistics
and Methodology 7, 2019).

Invariants
- An evaluation runs in a stream of its own, so training may continue meanwhile, and leaves nothing in the buffer.
- Seeds depend only on the task's place in the panel: two evaluations of a run are paired.
- If several splits are evaluated, each has panels and figures of its own.
- Cancelled episodes (the environment failed) are counted separately and are not part of the result.
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
from services.buffer import FROM_THE_START, Buffer
from services.codec import CodecError
from services.config.tree import Config
from services.errors import RunStalled
from services.schemas import Ticket, Trajectory
from services.tasks import split_tasks
from services.turns import turns_of

Key = TypeVar("Key", int, str)

POLL_S = 0.5
READ_ATTEMPTS = 3
Z_95 = 1.959963984540054

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rate:
    """A success rate with its 95 % Wilson interval.

    Attributes:
        won: number of episodes won.
        episodes: number of episodes.
        effective: number of independent episodes they are worth; None: they are independent.

    Example: `Rate(40, 50)` has the value 0.8 and the interval (0.67, 0.89).
    """

    won: int
    episodes: int
    effective: float | None = None

    @property
    def value(self) -> float:
        """Share of episodes won; NaN without episodes."""
        return self.won / self.episodes if self.episodes else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper bound; (0, 1) without episodes."""
        if not self.episodes:
            return 0.0, 1.0
        n, rate, z2 = self.effective or self.episodes, self.value, Z_95**2
        centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
        half = Z_95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference of two rates with its 95 % interval.

    Attributes:
        value: the difference.
        low: lower bound.
        high: upper bound.
    """

    value: float
    low: float
    high: float


def difference(after: Rate, before: Rate) -> Difference:
    """Compute `after − before`, with the interval of Newcombe's method 10 (Statistics in Medicine 17, 1998).

    Ignores that the episodes are paired, so the interval is conservative.
    """
    (low_a, high_a), (low_b, high_b) = after.interval, before.interval
    gain = after.value - before.value
    down = math.hypot(after.value - low_a, high_b - before.value)
    up = math.hypot(high_a - after.value, before.value - low_b)
    return Difference(gain, gain - down, gain + up)


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean of several values.

    Attributes:
        value: the mean; NaN without values.
        error: its standard error; NaN with fewer than two values.
        count: number of values.
    """

    value: float
    error: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """Bounds of the 95 % interval, by the normal approximation."""
        return self.value - Z_95 * self.error, self.value + Z_95 * self.error


def mean(values: Sequence[float]) -> Mean:
    """Compute the mean of values and its standard error."""
    count = len(values)
    if not count:
        return Mean(math.nan, math.nan, 0)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return Mean(statistics.fmean(values), error, count)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one episode of a panel.

    Attributes:
        panel: number of the panel.
        task_type: from the environment's facts; empty if it gives none.
        won: whether the episode was won.
        score: from the environment's facts; None if it gives none.
        steps: number of steps.
        valid: number of steps whose action was valid.
        task: number of the task in the panels of all splits.
        seed: number of the episode among those of the task.
        split: of the task.
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
        """Build the outcome of the episode played for a panel's ticket, from the environment's facts."""
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
class Usage:
    """What the episodes of a model behind an API took, cancelled ones included.

    Attributes:
        requests: number of responses.
        uncounted: how many of them the server gave no numbers of tokens for.
        tokens_in / tokens_out: tokens of the prompts and of the responses, as the server counted them.
        cost: of these tokens; None: no price is known.
        not_accepted: parameters of a request that the model does not accept, such as `temperature`.
    """

    requests: int = 0
    uncounted: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    not_accepted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Result of a policy's panels.

    Attributes:
        stream: name of the evaluation's stream.
        split: of the tasks; the names of several are separated by commas.
        version: policy version requested; None: whatever was served.
        success: over all finished episodes.
        panels: success by panel.
        seeds: success by seed.
        score: mean of the environment's `score`; None if it gives none.
        task_types: success by `task_type`.
        mean_steps: turns of an episode: steps of the environment.
        valid_fraction: share of turns whose action was valid.
        oldest_version: of the policy that played; None without episodes.
        newest_version: of the policy that played; None without episodes.
        cancelled: number of episodes that could not be played.
        complete: whether the panels were played to their end.
        splits: result of each split, if there are several.
        usage: of a model behind an API; None: of any other policy.
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
    usage: Usage | None = None

    def scalars(self, prefix: str = "evaluation") -> dict[str, float]:
        """The result as named numbers; with several splits also `evaluation/SPLIT/NAME` for each."""
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
    """Build the tickets of all panels: each task of `split_tasks` once for each seed, in a group of its own.

    Args:
        config: of the run.
        splits: sizes of the environments' splits.
        stream: of the tickets.

    Example: 2 seeds, 2 splits, panels of 3 tasks. Groups are numbered seed by seed, then split by split:

        seed 0   split a  0 1 2    split b  3 4 5
        seed 1   split a  6 7 8    split b  9 10 11     group 7 plays the task of group 1 again, with another seed

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
    """Number of tasks in the panels of one split."""
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
    """Play the panels and summarise them. Blocks.

    Args:
        config: of the run.
        buffer: the run's.
        env_splits: sizes of the environments' splits.
        stream: to play in; what it holds is removed first.
        version: policy version requested, for the result.
        should_stop: asked while waiting.
        on_progress: called with the number of finished episodes, and of all.

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
                f"evaluation {stream}: {len(damaged)} episodes are unreadable after {READ_ATTEMPTS} attempts; "
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
    """Summarise the episodes of all splits together and of each split.

    Args:
        config: of the run.
        outcomes: of the finished episodes.
        tickets: of all episodes.
        stream: of the evaluation.
        version: policy version requested.
        served: oldest and newest policy version that played.
        cancelled: groups whose episode could not be played.
    """
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
    """Summarise episodes.

    Args:
        outcomes: of the finished episodes.
        stream: of the evaluation.
        split: name for the result.
        version: policy version requested.
        served: oldest and newest policy version that played.
        cancelled: number of episodes that could not be played.
        complete: whether the panels were played to their end.
    """
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
    """Wait until every episode of the stream has finished or was cancelled, or for a stop.

    Args:
        buffer: the run's.
        stream: of the tickets.
        tickets: all of them; issued again if Redis loses some.
        timeout_s: longest time in which no episode finishes.
        should_stop: asked while waiting.
        on_progress: called with the number of finished episodes, and of all.

    Raises:
        RunStalled: none finished for `timeout_s`.
    """
    total, before, quiet_since = len(tickets), -1, time.monotonic()
    closed, upto = set[int](), FROM_THE_START
    while True:
        buffer.expire()  # the run's supervisor does it too; each call keeps the run's clock going
        closed, upto = _closed(buffer, stream, closed, upto)
        if len(closed) >= total:  # Redis may have lost some of them since
            closed, upto = _closed(buffer, stream, set(), FROM_THE_START)
        ended = len(closed)
        if ended != before:
            before, quiet_since = ended, time.monotonic()
            on_progress(ended, total)
        if ended >= total or should_stop():
            return
        if time.monotonic() - quiet_since > timeout_s:
            raise RunStalled(
                f"evaluation {stream}: no episode finished for {timeout_s:g} s ({ended} of {total} have); "
                "are the rollout actors and the environment server up?"
            )
        if not buffer.wait(stream, POLL_S):
            # Redis may have lost tickets with its last second of data; for all others issuing is a no-op.
            known = buffer.known(stream)
            buffer.issue([ticket for ticket in tickets if ticket.group not in known])
            closed, upto = set(), FROM_THE_START


def _closed(buffer: Buffer, stream: str, before: set[int], upto: int) -> tuple[set[int], int]:
    """Finished and cancelled episodes: those of `before`, and those since. Returns how far that goes, too."""
    news = buffer.closed(stream, upto)
    return before.union(news.complete, news.cancelled), news.upto


def _read(buffer: Buffer, stream: str, tickets: Sequence[Ticket]) -> tuple[list[Trajectory], list[int]]:
    """Read the finished episodes; return them, and the groups that are unreadable."""
    played: list[Trajectory] = []
    damaged: list[int] = []
    asked = {ticket.group: ticket for ticket in tickets}
    for group in buffer.complete(stream):
        try:
            found = buffer.read(stream, group)
            if [trajectory.ticket for trajectory in found] != [asked.get(group)]:
                raise CodecError("played for another ticket")
        except KeyError:
            continue
        except CodecError as error:
            log.warning("episode %s/%d unreadable, playing it again: %s", stream, group, error)
            damaged.append(group)
            continue
        played += found
    return played, damaged


def _outcome(episode: Trajectory, config: Config) -> Outcome:
    turns = turns_of(episode.steps)
    return Outcome.of(episode.ticket, episode.facts, config, steps=len(turns), valid=sum(turns.valid))


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
    """Number of independent episodes that those of several tasks are worth: n / d, see the module.

    Between the number of tasks and the number of episodes. If none or all were won, the variance says nothing about how
    alike a task's episodes are, so each task counts as one episode.

    Args:
        tasks: (won, played) of each task.

    Example: four tasks of two episodes, half of them won.

        each task won both or none    2/2 2/2 0/2 0/2    4: a second seed adds nothing
        each task won one             1/2 1/2 1/2 1/2    8: as independent episodes
    """
    won, played, count = sum(won for won, _ in tasks), sum(played for _, played in tasks), len(tasks)
    rate = won / played
    if count < 2 or won in (0, played):
        return float(count)
    between = count / (count - 1) * sum((won - rate * played) ** 2 for won, played in tasks) / played**2
    independent = rate * (1 - rate) / (played - 1)
    return min(float(played), max(float(count), played * independent / between)) if between else float(played)
