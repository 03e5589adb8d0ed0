"""Policy updates of one rank, on the steps of groups that are made up or were played."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anchorage.planning.shapes import Shape
from learner.batching import MicroBatch
from learner.prepare import OptimizerStep
from learner.rank.engine_deepspeed import DeepSpeedEngine
from learner.rank.losses import LossTerms, TokenBatch, policy_loss
from services.config.tree import Config
from services.schemas import Step, Task, Ticket, Trajectory, VersionSpan

Range = tuple[int, int]
"""From the first to the second, which is left out."""
GROUP = 8


def token_batch(batch: MicroBatch, logprob: Tensor, entropy: Tensor) -> TokenBatch:
    """Return the input of the loss for a micro-batch."""
    arrays = (batch.behaviour, batch.advantage, batch.weight)
    behaviour, advantage, weight = (torch.tensor(array, device=logprob.device) for array in arrays)
    return TokenBatch(logprob, behaviour, advantage, weight, entropy=entropy)


def loss_of(batch: MicroBatch, config: Config, total: int, logprob: Tensor, entropy: Tensor) -> LossTerms:
    """Return the loss of a micro-batch; `total` tokens are in the whole step."""
    return policy_loss(token_batch(batch, logprob, entropy), config.loss, total)


def apply(engine: DeepSpeedEngine, config: Config, step: OptimizerStep) -> dict[str, float]:
    """Take one optimizer step; return its figures."""
    for batch in step.batches:

        def loss(logprob: Tensor, entropy: Tensor, batch: Any = batch) -> LossTerms:
            return loss_of(batch, config, step.total_tokens, logprob, entropy)

        engine.accumulate(batch, loss)
    return engine.step()


def made_up_groups(
    groups: int,
    random: np.random.Generator,
    vocabulary: int,
    *,
    prompt: Range = (300, 900),
    response: Range = (50, 250),
    steps: Range = (10, 20),
    members: int = GROUP,
) -> list[list[Trajectory]]:
    """Return groups of random tokens.

    Args:
        groups: number of them.
        random: draws everything.
        vocabulary: token ids are below it.
        prompt: tokens of a prompt.
        response: tokens of a response.
        steps: of an episode.
        members: episodes of a group.
    """

    def step(last: bool, won: bool) -> Step:
        length = int(random.integers(*response))
        return Step(
            prompt_ids=random.integers(0, vocabulary, int(random.integers(*prompt))).astype(np.int32),
            response_ids=random.integers(0, vocabulary, length).astype(np.int32),
            logprobs=np.full(length, -np.log(vocabulary), np.float32),
            versions=(VersionSpan(0, length),),
            anchor=f"room {int(random.integers(0, 5))}",
            observation="",
            prompt="",
            response="",
            action="",
            reward=10.0 if won and last else 0.0,
            valid=True,
            terminated=won and last,
        )

    def episode(group: int, member: int) -> Trajectory:
        # Every second one wins: no group is without advantages.
        count, won = int(random.integers(*steps)), member % 2 == 0
        task = Task(env="alfworld", split="train", index=group)
        ticket = Ticket(group=group, member=member, group_size=members, task=task, seed=0)
        played = tuple(step(number == count - 1, won) for number in range(count))
        return Trajectory(ticket=ticket, steps=played, facts={"won": won})

    return [[episode(group, member) for member in range(members)] for group in range(groups)]


def flops(batches: Sequence[MicroBatch], shape: Shape) -> float:
    """Return the operations of forward and backward passes: matrices, causal attention, head on responses."""
    projections = shape.hidden * (2 * shape.queries + 2 * shape.keys)
    matrices = shape.layers * (projections + 3 * shape.hidden * shape.inner)
    total = 0.0
    for batch in batches:
        own, read = np.diff(batch.starts).astype(float), np.diff(batch.path_starts).astype(float)
        pairs = float((own * read - own * (own - 1) / 2).sum())
        head = len(batch.targets) * shape.hidden * shape.vocabulary
        total += 2 * (batch.tokens * matrices + head) + 4 * pairs * shape.queries * shape.layers
    return 3 * total
