"""Plays one ticket: reset, then prompt, response, action, transition, until the episode ends.

Invariants
- The step's anchor is the key of the state in which the action was chosen, not of the state that it led to.
- All randomness of a step comes from the ticket's seed and the step's number: the same policy replays the same episode.
- A lost session restarts the episode from reset; no step of the lost attempt is kept.
- An action at which the session is lost again and again, where it survives another action, is the last step of the
  episode: invalid, and without a reward. The policy can end its environment (`raise SystemExit`), and a failed ticket
  would be played the same way again.
- The session is closed however the episode ends.
- A refused action is a step like any other, and invalid (`env_servers/clients/refusals.py`).
- Every trajectory has the fact `won`: the environment's word, else whether the episode terminated with a reward.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actors.engine.interface import Sample, Sampler
from actors.parsing import ParsedAction
from actors.prompts import Exchange, Prompt, PromptBuilder
from env_servers.client import EnvironmentClient, RequestRejected, SessionLost
from env_servers.protocol import ActionForm, ResetRequest, StepResult
from services.config.tree import Config, EnvConfig
from services.schemas import Step, Ticket, Trajectory

logger = logging.getLogger(__name__)

RESTARTS = 5
LOSSES = 3
"""As often in a row the same action must have lost its session before it is asked whether the action is the cause."""
ANY_ACTION = "look"
FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0


class EpisodeFailed(Exception):
    """The ticket cannot be played: its environment keeps losing the session, or ends before the first action."""


def step_seed(seed: int, step: int) -> int:
    """Sampling seed of a step, in [0, 2^63): stable across processes, unrelated for neighbouring seeds and steps."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


async def respond(
    engine: Sampler,
    prompts: PromptBuilder,
    config: Config,
    goal: str | None,
    history: Sequence[Exchange],
    state: StepResult,
    *,
    temperature: float,
    seed: int,
    form: ActionForm,
) -> tuple[Prompt, Sample, ParsedAction]:
    """What the policy reads in a state, what it writes, and the action that this is.

    `seed`: the episode's. `form`: what the environment wants actions to look like.

    Raises:
        EngineFailed: from the engine.
    """
    prompt = prompts.build(goal, history, state)
    sample = await engine.generate(
        prompt.ids,
        temperature=temperature,
        max_tokens=config.model.max_response_tokens,
        seed=step_seed(seed, state.step + 1),
    )
    return prompt, sample, prompts.parse(prompt.begun + sample.text, state.admissible, form)


def is_won(facts: Mapping[str, object], last: StepResult, won_at: float | None) -> bool:
    """Whether an episode was won: the environment's `won`, else by how it ended (`env.won_at`).

    That is by the reward of the last transition: a sum would call shaped rewards of a lost episode a success.
    """
    told = facts.get("won")
    if told is not None:
        return bool(told)
    return last.terminated and (last.reward > 0 if won_at is None else last.reward >= won_at)


async def play(
    ticket: Ticket,
    client: EnvironmentClient,
    engine: Sampler,
    prompts: PromptBuilder,
    config: Config,
    *,
    actor: str = "",
    form: ActionForm | None = None,
) -> Trajectory:
    """Play the ticket to its end. `form`: of the environment's actions; None: asks the configuration, then the client.

    Raises:
        EpisodeFailed: see there.
        EnvironmentUnavailableError, RequestRejected: from the client.
        EngineFailed: from the engine.
    """
    form = form or await action_form(client, config, ticket.task.env)
    attempt = _Attempt(ticket, client, engine, prompts, config, form)
    started = time.time()
    delay = FIRST_DELAY_S
    losses: list[_LostAtAction] = []
    for _ in range(RESTARTS + 1):
        try:
            if _same_actions(losses[-LOSSES:]):
                steps, facts = await attempt.without(losses[-1])
                logger.warning("ticket %s: the action of step %d ends its session", ticket.id, len(steps))
            else:
                steps, facts = await attempt.play()
            break
        except SessionLost as error:
            logger.warning("ticket %s: session lost (%s), restarting in %.1f s", ticket.id, error, delay)
            losses = [*losses, error] if isinstance(error, _LostAtAction) else []
            lost = error
        await asyncio.sleep(delay)
        delay = min(2 * delay, LONGEST_DELAY_S)
    else:
        raise EpisodeFailed(f"the environment lost the session {RESTARTS + 1} times: {lost}")
    return Trajectory(ticket, steps, facts, actor, started, time.time())


class _LostAtAction(SessionLost):
    """The session was lost at the last of these steps, which is an invalid end here. `facts`: the episode's."""

    def __init__(self, steps: tuple[Step, ...], facts: dict[str, object], cause: SessionLost) -> None:
        super().__init__(str(cause))
        self.steps = steps
        self.facts = facts


def _same_actions(losses: Sequence[_LostAtAction]) -> bool:
    """Whether these are `LOSSES` losses after the same actions."""
    return len(losses) == LOSSES and len({tuple(step.action for step in loss.steps) for loss in losses}) == 1


async def action_form(client: EnvironmentClient, config: Config, environment: str) -> ActionForm:
    """What is done to the environment's actions. Raises as the client's `info`."""
    return config.environment(environment).action_form or (await client.info()).action_form


@dataclass(frozen=True, slots=True)
class _Attempt:
    ticket: Ticket
    client: EnvironmentClient
    engine: Sampler
    prompts: PromptBuilder
    config: Config
    form: ActionForm

    async def play(self) -> tuple[tuple[Step, ...], dict[str, object]]:
        """The steps of one session and the episode's facts, later ones over earlier ones."""
        env = self.config.environment(self.ticket.task.env)
        state = await self._reset()
        try:
            if state.done:
                raise EpisodeFailed("the environment ended before the first action")
            facts: dict[str, object] = dict(state.facts)
            goal = str(facts["goal"]) if facts.get("goal") else None
            history: list[Exchange] = []
            steps: list[Step] = []
            while not state.done:
                step, after, lost = await self._step(state, goal, history)
                steps.append(step)
                if lost is not None:
                    raise _LostAtAction(tuple(steps), facts, lost) from lost
                history.append(Exchange(state.observation, step.action, step.response, step.response_ids.tolist()))
                facts.update(after.facts)
                state = after
            return tuple(steps), {**facts, "won": is_won(facts, state, env.won_at)}
        finally:
            await self.client.close_session(state.session)

    async def without(self, loss: _LostAtAction) -> tuple[tuple[Step, ...], dict[str, object]]:
        """The lost attempt's steps, where a session survives another action in the place of the last one.

        Raises:
            SessionLost: it does not: the action is not the cause.
        """
        state = await self._reset()
        try:
            for step in loss.steps[:-1]:
                state = await self.client.step(state.session, state.step + 1, step.action)
            known = state.admissible or [ANY_ACTION]
            other = next((action for action in known if action != loss.steps[-1].action), ANY_ACTION)
            with contextlib.suppress(RequestRejected):  # which is an answer too
                await self.client.step(state.session, state.step + 1, other)
        finally:
            await self.client.close_session(state.session)
        return loss.steps, {**loss.facts, "won": False}

    async def _reset(self) -> StepResult:
        task, env = self.ticket.task, self.config.environment(self.ticket.task.env)
        return await self.client.reset(
            ResetRequest(
                split=task.split,
                index=task.index,
                anchor=env.anchor,
                max_steps=min(env.max_steps, self.ticket.max_steps or env.max_steps),
            )
        )

    async def _step(
        self, state: StepResult, goal: str | None, history: Sequence[Exchange]
    ) -> tuple[Step, StepResult, SessionLost | None]:
        """The next step, the state after it, and where its action lost the session, that."""
        config = self.config
        ticket = self.ticket
        prompt, sample, parsed = await respond(
            self.engine,
            self.prompts,
            config,
            goal,
            history,
            state,
            temperature=ticket.temperature,
            seed=ticket.seed,
            form=self.form,
        )
        _check_sampled(sample)
        lost = None
        try:
            after = await self.client.step(state.session, state.step + 1, parsed.action)
        except SessionLost as error:
            lost, after = error, _ended_by_action(state)
        step = Step(
            prompt_ids=np.asarray(prompt.ids, dtype=np.int32),
            response_ids=np.asarray(sample.token_ids, dtype=np.int32),
            logprobs=np.asarray(sample.logprobs, dtype=np.float32),
            versions=sample.versions,
            anchor=state.anchor,
            observation=state.observation,
            prompt=prompt.text,
            response=sample.text,
            action=parsed.action,
            reward=_scaled_reward(after.reward, config.environment(ticket.task.env)),
            valid=parsed.valid and after.accepted,
            terminated=after.terminated,
            truncated=after.truncated,
            finished=sample.finished,
            prompt_truncated=prompt.truncated,
        )
        return step, after, lost


def _ended_by_action(state: StepResult) -> StepResult:
    """What an action led to that ended its session."""
    end = {"step": state.step + 1, "reward": 0.0, "terminated": True, "truncated": False, "accepted": False}
    return state.model_copy(update=end)


def _check_sampled(sample: Sample) -> None:
    """Raises EpisodeFailed where a sampled token has no log-probability to train with."""
    wrong = next((value for value in sample.logprobs if not math.isfinite(value)), None)
    if wrong is not None:
        raise EpisodeFailed(
            f"the inference engine gave the log-probability {wrong} to a token that it sampled, with policy version "
            f"{sample.versions[-1].version}: are its weights finite, and is model.dtype wide enough for the model?"
        )


def _scaled_reward(reward: float, env: EnvConfig) -> float:
    """Raises EpisodeFailed where the reward is not a finite number."""
    scaled = reward * env.success_reward
    if not math.isfinite(scaled):
        raise EpisodeFailed(
            f"the environment {env.name} gave the reward {reward}, and times env.success_reward={env.success_reward:g} "
            f"it is {scaled}, not a finite number"
        )
    return scaled
