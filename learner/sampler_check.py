"""Compare sampler and learner at the start of a run, before any group is issued.

The rollout actors play a few episodes of two steps with the policy that was just published, as they play all episodes,
and the learner scores the sampled tokens. That covers everything that must agree: names and layout of the weights,
vLLM's model and its update, prompts, and the path through Redis.

Invariants
- The check runs in a stream of its own and leaves nothing in the buffer.
- A disagreement is one line that names the model. Episodes that cannot be played are left to the run to report.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from learner.batching import Row
from learner.dispatch import ticket_seed
from learner.evaluation import wait_for_episodes
from learner.rank.parity import BOUND, MEAN_BFLOAT16
from services.buffer import Buffer
from services.codec import CodecError
from services.config.tree import Config
from services.errors import ModelUnavailable
from services.schemas import Task, Ticket, Trajectory

STREAM = "check"
EPISODES = 8
STEPS = 2

log = logging.getLogger(__name__)


class Scorer(Protocol):
    """Computes the learner's log-probabilities."""

    def gap(self, rows: Sequence[Row]) -> tuple[float, float]:
        """Largest and mean absolute difference between the rows' log-probabilities and the learner's, in nats."""
        ...


def bounds(dtype: str) -> tuple[float, float]:
    """Largest and mean difference allowed, in nats, for a policy of this dtype.

    In float32 rounding causes 1e-6 to 1e-4. In bfloat16 both sides round every layer, in different orders: single
    tokens may differ widely although nothing is wrong, so only the mean counts, see
    `learner.rank.parity.MEAN_BFLOAT16`.
    """
    return (BOUND, BOUND) if dtype == "float32" else (math.inf, MEAN_BFLOAT16)


def require_agreement(
    config: Config,
    buffer: Buffer,
    tasks: Sequence[Task],
    scorer: Scorer,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Play tasks, score the sampled tokens and compare.

    Args:
        config: of the run.
        buffer: the run's.
        tasks: one episode each.
        scorer: the learner's ranks; the version they hold must have been published.
        should_stop: asked while waiting; True skips the check.

    Raises:
        ModelUnavailable: sampler and learner disagree.
        RunStalled: no episode ended for `learner.group_timeout_s`.
    """
    played = _play(config, buffer, tasks, should_stop)
    rows = [
        Row(np.concatenate([step.prompt_ids, step.response_ids]).astype(np.int32), step.logprobs, 0.0)
        for episode in played
        for step in episode.steps
    ]
    if not rows:
        return
    largest, mean = scorer.gap(rows)
    log.info("sampler and learner differ by at most %.2g nats, %.2g on average", largest, mean)
    most, most_mean = bounds(config.model.dtype)
    if not (largest <= most and mean <= most_mean):
        raise ModelUnavailable(
            f"model.path {config.model.path}: vLLM's log-probabilities differ from the learner's by up to "
            f"{largest:.2g} nats, {mean:.2g} on average: this model cannot be trained; see anchorage model check"
        )


def _play(config: Config, buffer: Buffer, tasks: Sequence[Task], should_stop: Callable[[], bool]) -> list[Trajectory]:
    """Play the tasks; return the episodes that were played, none if stopped."""
    tickets = _tickets(config, tasks)
    groups = [ticket.group for ticket in tickets]
    buffer.remove(STREAM, sorted(buffer.known(STREAM)))
    buffer.issue(tickets)
    try:
        wait_for_episodes(buffer, STREAM, tickets, config.learner.group_timeout_s, should_stop)
        if should_stop():
            return []
        for reason in buffer.cancelled(STREAM).values():
            log.warning("sampler check: episode not played: %s", reason)
        return [episode for group in buffer.complete(STREAM) for episode in _read(buffer, group)]
    finally:
        buffer.remove(STREAM, groups)


def _tickets(config: Config, tasks: Sequence[Task]) -> list[Ticket]:
    """One ticket for each task, in a group of its own."""
    return [
        Ticket(
            stream=STREAM,
            group=group,
            member=0,
            group_size=1,
            task=task,
            seed=ticket_seed(config.run.seed, STREAM, group, 0),
            temperature=config.rollout.temperature,
            max_steps=STEPS,
        )
        for group, task in enumerate(tasks)
    ]


def _read(buffer: Buffer, group: int) -> list[Trajectory]:
    try:
        return list(buffer.read(STREAM, group))
    except (KeyError, CodecError) as error:  # lost by Redis meanwhile
        log.warning("sampler check: episode unreadable: %s", error)
        return []
