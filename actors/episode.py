"""Play one ticket: reset, then prompt, response, action and transition until the episode ends.

Invariants
- A step's anchor is the key of the state in which the action was chosen, not of the state that it led to.
- All randomness of a step comes from the ticket's seed and the step number: the same policy replays the same episode.
- A lost session restarts the episode from reset; no step of the lost attempt is kept.
- An action at which the environment repeatedly fails or loses its session, where another action passes, is the last
  step of the episode: invalid and without reward. A policy can crash its environment (`raise SystemExit`), and a retry
  of the ticket would repeat the same action.
- Suspected actions are verified one at a time: an action that hangs a server takes the sessions of all other episodes
  with it, often again and again at the same step, since they restart together.
- An action after which no environment server is usable, and stays so, costs the ticket one attempt, because it may be
  the cause. An outage at any other moment costs none.
- The session is closed however the episode ends.
- A refused action is an ordinary step, marked invalid (`env_servers/clients/refusals.py`).
- Every trajectory has the fact `won`: the environment's, else whether the episode terminated with a reward.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from actors.engine.interface import Sample, Sampler
from actors.gateway.messages import Message
from actors.parsing import ParsedAction
from actors.prompts import EpisodePrompts, Exchange, Prompt, Prompts
from env_servers.client import (
    EnvironmentClient,
    EnvironmentFailed,
    EnvironmentUnavailableError,
    RequestRejected,
    SessionLost,
)
from env_servers.protocol import ActionForm, ResetRequest, StepResult
from services.backoff import Backoff
from services.config.tree import Config, EnvConfig
from services.schemas import Step, Ticket, Trajectory

logger = logging.getLogger(__name__)

RESTARTS = 5
LOSSES = 3
"""Losses in a row at the same actions after which `_Attempt.is_cause` verifies whether the last action is the cause."""
WAITS = 2
"""Further resets, each as patient as its client, for a server that went away at an action. A server that hangs at it
and is restarted in that time is given the same action again, so the cause can be verified."""
ANY_ACTION = "look"
"""Tried in place of a suspected action if the environment lists no admissible one."""
BACKOFF = Backoff(0.2, 5.0)


class EpisodeFailed(Exception):
    """The ticket cannot be played; costs it one attempt. The message is one line."""


def step_seed(seed: int, step: int) -> int:
    """Sampling seed of a step, in [0, 2^63).

    Stable across processes, unrelated for neighbouring seeds and steps.

    Args:
        seed: the ticket's.
        step: from 1.
    """
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Answerer(ABC):
    """Answers prompts by their text, as a model behind an HTTP API does; a `Sampler` gets token ids alone.

    Its episodes are not for training: their token ids say how long a response is, and there are no log-probabilities.
    """

    @abstractmethod
    async def answer(self, prompt: Prompt, *, temperature: float, max_tokens: int, seed: int) -> Sample:
        """Answer one prompt, with the arguments of `Sampler.generate`.

        Returns:
            The sample; its text is the whole response, `prompt.begun` included.
        """


async def respond(
    engine: Sampler | Answerer,
    prompts: EpisodePrompts,
    config: Config,
    goal: str | None,
    history: Sequence[Exchange],
    state: StepResult,
    *,
    temperature: float,
    seed: int,
    form: ActionForm,
) -> tuple[Prompt, Sample, ParsedAction]:
    """Build the prompt for a state, sample the response and parse its action.

    Args:
        engine: samples the response, or answers the prompt.
        prompts: of the episode.
        config: of the run; its prompt rules and response length are used.
        goal: of the episode, if it has one.
        history: earlier steps, oldest first.
        state: the state to act in.
        temperature: of sampling.
        seed: the episode's.
        form: how the environment wants actions to be normalised.

    Raises:
        EngineFailed: from the engine.
    """
    prompt = prompts.build(goal, history, state)
    most, seed = config.model.max_response_tokens, step_seed(seed, state.step + 1)
    if isinstance(engine, Answerer):
        sample = await engine.answer(prompt, temperature=temperature, max_tokens=most, seed=seed)
        return prompt, sample, prompts.read(replace(prompt, begun=""), sample, state, form)
    sample = await engine.generate(prompt.ids, temperature=temperature, max_tokens=most, seed=seed)
    return prompt, sample, prompts.read(prompt, sample, state, form)


def is_won(facts: Mapping[str, object], last: StepResult, won_at: float | None) -> bool:
    """Whether an episode was won: the fact `won` if the environment gives it, else by its end and `env.won_at`.

    The reward of the last transition decides, not the sum: a sum would count shaped rewards of a lost episode as a
    success.

    Example: with `won_at=1.0`, rewards 0, 5, 0.9 and termination are lost; -9, 0, 1 are won.
    """
    told = facts.get("won")
    if told is not None:
        return bool(told)
    return last.terminated and (last.reward > 0 if won_at is None else last.reward >= won_at)


async def play(
    ticket: Ticket,
    client: EnvironmentClient,
    engine: Sampler | Answerer,
    prompts: Prompts,
    config: Config,
    *,
    actor: str = "",
    form: ActionForm | None = None,
    alone: asyncio.Lock | None = None,
) -> Trajectory:
    """Play the ticket to its end.

    Args:
        ticket: the episode to play.
        client: of the ticket's environment.
        engine: samples responses, or answers prompts.
        prompts: builds prompts.
        config: of the run.
        actor: name to record in the trajectory.
        form: how the environment wants actions to be normalised; None: from the configuration, else asked of `client`.
        alone: held while a suspected action is verified; one lock for all episodes of an environment.

    Raises:
        EpisodeFailed: the environment keeps losing the session whatever the action, ends before the first action, or
            becomes unavailable at one of the episode's actions for longer than `WAITS` resets take.
        EnvironmentUnavailableError: no server is usable at the start of the episode.
        RequestRejected: from the client.
        EngineFailed: from the engine.
    """
    form = form or await action_form(client, config, ticket.task.env)
    attempt = _Attempt(ticket, client, engine, prompts, config, form)
    started = time.time()
    losses: list[_LostAtAction] = []
    attempts = restarts = waits = 0
    while True:
        attempts += 1
        delay = BACKOFF.delay(attempts)
        try:
            played = await _play_or_end(attempt, losses, alone or asyncio.Lock())
            return Trajectory(ticket, played.steps, played.facts, actor, started, time.time(), played.final_anchor)
        except SessionLost as error:
            logger.warning("ticket %s: session lost (%s), restarting in %.1f s", ticket.id, error, delay)
            if not isinstance(error, _LostAtAction):
                losses.clear()
            else:
                losses.append(error)
            restarts, waits = restarts + 1, 0
            if restarts > RESTARTS:
                raise EpisodeFailed(f"the environment lost the session {restarts} times: {error}") from error
        except EnvironmentUnavailableError as error:
            if not losses:
                raise
            waits += 1
            if waits > WAITS:
                step = len(losses[-1].steps)
                raise EpisodeFailed(
                    f"the environment became unavailable at the action of step {step}: {error}"
                ) from error
        await asyncio.sleep(delay)


class _LostAtAction(SessionLost):
    """The environment failed, or lost its session, at the last of `steps`; see `_Attempt.play`.

    Attributes:
        steps: of the attempt; the last one as the invalid end of the episode.
        facts: of the episode so far.
    """

    def __init__(self, steps: tuple[Step, ...], facts: dict[str, object], cause: Exception) -> None:
        super().__init__(str(cause))
        self.steps = steps
        self.facts = facts


@dataclass(frozen=True, slots=True)
class _Played:
    """An attempt that was played to its end.

    Attributes:
        steps: of the episode.
        facts: of the episode; later ones override earlier ones.
        final_anchor: of the state that the last step led to; None: there is none.
    """

    steps: tuple[Step, ...]
    facts: dict[str, object]
    final_anchor: str | None = None


async def _play_or_end(attempt: _Attempt, losses: list[_LostAtAction], alone: asyncio.Lock) -> _Played:
    """Play an attempt, or return the last lost one if its last action is verified to be the cause of the losses.

    Losses of which it is not are cleared: the action of another episode was the cause.

    Example: in step 2 the policy says `format disk`, which crashes the environment.

        attempt 1   reset, open desk, format disk   session lost, restart
        attempt 2   reset, open desk, format disk   session lost, restart
        attempt 3   reset, open desk, format disk   session lost: `LOSSES` times the same actions
        verify      reset, open desk, look          passes: neither the task nor the server is broken
                    reset, open desk, format disk   session lost: the action is the cause
        trajectory  open desk, format disk          the last step invalid, reward 0, terminated
    """
    if not _same_actions(losses[-LOSSES:]):
        return await attempt.play()
    async with alone:
        is_cause = await attempt.is_cause(losses[-1])
    if not is_cause:
        losses.clear()
        return await attempt.play()
    last = losses[-1]
    logger.warning("ticket %s: the environment cannot take the action of step %d", attempt.ticket.id, len(last.steps))
    return _Played(last.steps, {**last.facts, "won": False})


def _same_actions(losses: Sequence[_LostAtAction]) -> bool:
    """Whether these are `LOSSES` losses after the same actions."""
    return len(losses) == LOSSES and len({tuple(step.action for step in loss.steps) for loss in losses}) == 1


async def action_form(client: EnvironmentClient, config: Config, environment: str) -> ActionForm:
    """How the environment wants actions to be normalised: from the configuration, else from the client's `info`.

    Raises:
        EnvironmentUnavailableError: no server is usable.
    """
    return config.environment(environment).action_form or (await client.info()).action_form


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Plays a ticket once from reset; its methods may be called again."""

    ticket: Ticket
    client: EnvironmentClient
    engine: Sampler | Answerer
    prompts: Prompts
    config: Config
    form: ActionForm

    async def play(self) -> _Played:
        """Play one session to its end.

        Raises:
            _LostAtAction: the environment failed or lost the session at an action.
        """
        env = self.config.environment(self.ticket.task.env)
        state = await self._reset()
        try:
            if state.done:
                raise EpisodeFailed("the environment ended before the first action")
            facts: dict[str, object] = dict(state.facts)
            goal = str(facts["goal"]) if facts.get("goal") else None
            prompts = self.prompts.begin()
            history: list[Exchange] = []
            steps: list[Step] = []
            while not state.done:
                step, answer, after, failure = await self._step(prompts, state, goal, history)
                steps.append(step)
                if failure is not None:
                    raise _LostAtAction(tuple(steps), facts, failure) from failure
                ids = step.response_ids.tolist()
                history.append(Exchange(state.observation, step.action, step.response, ids, answer, state.admissible))
                facts.update(after.facts)
                state = after
            return _Played(tuple(steps), {**facts, "won": is_won(facts, state, env.won_at)}, state.anchor)
        finally:
            await self.client.close_session(state.session)

    async def is_cause(self, loss: _LostAtAction) -> bool:
        """Whether the environment fails at the last action of a lost attempt, but not at another one in its place.

        Replays the recorded actions in two new sessions; nothing is sampled.

        Raises:
            SessionLost: a session is lost at another action too.
            EnvironmentFailed: the environment fails at another action too.
        """
        last = loss.steps[-1].action
        failure = await self._replay(loss, lambda known: next((other for other in known if other != last), ANY_ACTION))
        if failure is not None:
            raise failure
        return await self._replay(loss, lambda known: last) is not None

    async def _replay(self, loss: _LostAtAction, choose: Callable[[list[str]], str]) -> Exception | None:
        """Take the lost attempt's actions but the last, then the chosen one; return the failure at that one, if any."""
        state = await self._reset()
        try:
            for step in loss.steps[:-1]:
                state = await self.client.step(state.session, state.step + 1, step.action)
            try:
                await self.client.step(state.session, state.step + 1, choose(state.admissible or []))
            except (SessionLost, EnvironmentFailed) as error:
                return error
            except RequestRejected as error:  # the session took notice of the action, so it is alive
                logger.debug("ticket %s: the replayed action was rejected: %s", self.ticket.id, error)
        finally:
            await self.client.close_session(state.session)
        return None

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
        self, prompts: EpisodePrompts, state: StepResult, goal: str | None, history: Sequence[Exchange]
    ) -> tuple[Step, Message | None, StepResult, Exception | None]:
        """Take the next step.

        Returns:
            The step, its response where responses are messages, the state after it, and the error if the environment
            failed or lost the session at its action.
        """
        config = self.config
        ticket = self.ticket
        prompt, sample, parsed = await respond(
            self.engine,
            prompts,
            config,
            goal,
            history,
            state,
            temperature=ticket.temperature,
            seed=ticket.seed,
            form=self.form,
        )
        check_sampled(sample)
        failure = None
        try:
            after = await self.client.step(state.session, state.step + 1, parsed.action)
        except (SessionLost, EnvironmentFailed) as error:
            failure, after = error, _ended_by_action(state)
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
            reward=scaled_reward(after.reward, config.environment(ticket.task.env)),
            valid=parsed.valid and after.accepted,
            terminated=after.terminated,
            truncated=after.truncated,
            finished=sample.finished,
            prompt_truncated=prompt.truncated,
        )
        return step, parsed.answer, after, failure


def _ended_by_action(state: StepResult) -> StepResult:
    """The state after an action that ended its session."""
    end = {"step": state.step + 1, "reward": 0.0, "terminated": True, "truncated": False, "accepted": False}
    return state.model_copy(update=end)


def check_sampled(sample: Sample) -> None:
    """Raise EpisodeFailed if a sampled token has no finite log-probability to train with."""
    wrong = next((value for value in sample.logprobs if not math.isfinite(value)), None)
    if wrong is not None:
        raise EpisodeFailed(
            f"the inference engine returned the log-probability {wrong} for a token that it sampled, with policy "
            f"version {sample.versions[-1].version}: are its weights finite, and is model.dtype wide enough for the "
            "model?"
        )


def scaled_reward(reward: float, env: EnvConfig) -> float:
    """Reward times `env.success_reward`. Raises EpisodeFailed if that is not a finite number."""
    scaled = reward * env.success_reward
    if not math.isfinite(scaled):
        raise EpisodeFailed(
            f"the environment {env.name} gave the reward {reward}; times env.success_reward={env.success_reward:g} "
            f"it is {scaled}, not a finite number"
        )
    return scaled
