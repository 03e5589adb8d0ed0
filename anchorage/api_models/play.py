"""Plays the evaluation panels with an API model: the tasks, prompts, parser and rules of a local policy's episodes.

Invariants
- A refusal and an empty response are an invalid action. An episode that the model does not answer, or that the
  environment cannot play, is cancelled: it counts apart, with its reason, and its tokens are counted.
- A model that has never answered ends the evaluation with one line, before its other episodes are played.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from actors.engine.interface import Sample
from actors.episode import Answerer, EpisodeFailed, action_form, play
from actors.prompts import Prompt
from anchorage.api_models.client import ApiModel, NoAnswer
from anchorage.api_models.prompts import ApiPrompts
from anchorage.api_models.settings import ApiOptions, Endpoint, model_name
from anchorage.api_models.transcripts import Transcripts
from anchorage.api_models.wire import Reply
from anchorage.runs import event_loop
from anchorage.runs.in_process import Cancelled, Played, play_panels
from anchorage.runs.progress import play_summary
from env_servers.client import EnvironmentClient, EnvironmentUnavailableError, RequestRejected
from env_servers.protocol import ActionForm
from learner.evaluation import EvaluationResult, Outcome, Usage, summarise_splits
from services.config.tree import Config
from services.errors import EnvironmentUnavailable, RunStalled
from services.schemas import Ticket, Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """One request of an episode: what the model was sent, its reply, and how long that took."""

    prompt: Sequence[str] | str
    reply: Reply
    seconds: float


@dataclass
class EpisodePlayer(Answerer):
    """Answers the prompts of one episode."""

    model: ApiModel
    prompts: ApiPrompts
    as_text: bool
    calls: list[Call] = field(default_factory=list)

    async def answer(self, prompt: Prompt, *, temperature: float, max_tokens: int, seed: int) -> Sample:
        sent = self.prompts.as_text(prompt) if self.as_text else prompt.turns or (prompt.text,)
        began = time.monotonic()
        reply = await self.model.ask(sent, temperature=temperature, seed=seed)
        self.calls.append(Call(sent, reply, time.monotonic() - began))
        ids = self.prompts.length_of(reply.text, finished=reply.finished)
        return Sample(ids, [], (), reply.text, reply.finished)

    def usage(self) -> Usage:
        counted = [
            (call.reply.tokens_in, call.reply.tokens_out)
            for call in self.calls
            if call.reply.tokens_in is not None and call.reply.tokens_out is not None
        ]
        return Usage(
            requests=len(self.calls),
            uncounted=len(self.calls) - len(counted),
            tokens_in=sum(tokens for tokens, _ in counted),
            tokens_out=sum(tokens for _, tokens in counted),
        )


def evaluate_api_model(
    policy: str,
    config: Config,
    options: ApiOptions,
    where: Endpoint,
    transcripts: Transcripts,
    on_progress: Callable[[int, str], None],
    should_stop: Callable[[], bool],
) -> EvaluationResult:
    """Play the panels. `on_progress` gets the number of episodes ended, and the state in a few words.

    Raises:
        ModelUnavailable: the model cannot be reached, is unknown, or does not accept the key.
        RunStalled: no episode could be played.
        EnvironmentUnavailable: the environment cannot be reached, or has no such split.
    """
    try:
        return event_loop.run(_Evaluation(policy, config, options, where, transcripts, on_progress).play(should_stop))
    except (EnvironmentUnavailableError, RequestRejected) as error:
        raise EnvironmentUnavailable(str(error)) from None


class _Evaluation:
    def __init__(
        self,
        policy: str,
        config: Config,
        options: ApiOptions,
        where: Endpoint,
        transcripts: Transcripts,
        on_progress: Callable[[int, str], None],
    ) -> None:
        self._policy, self._config, self._options = policy, config, options
        self._transcripts, self._on_progress = transcripts, on_progress
        self._prompts = ApiPrompts(config)
        name = model_name(policy) or policy
        self._price = options.price(name)
        self._model = ApiModel(
            name,
            where,
            options,
            most_tokens=config.model.max_response_tokens,
            thoughts=self._prompts.of_text_template,
        )
        self._forms: dict[str, ActionForm] = {}
        self._usage: dict[int, Usage] = {}
        self._cancelled = 0

    async def play(self, should_stop: Callable[[], bool]) -> EvaluationResult:
        def note(ended: int, won: int) -> None:
            usage = self._total()
            tokens = f"{usage.tokens_in + usage.tokens_out:,} tokens"
            self._on_progress(ended, f"{play_summary(won, ended - self._cancelled)}  {tokens}")

        async with self._model:
            played = await play_panels(
                self._config,
                self._policy,
                self._play,
                at_once=self._options.at_once,
                on_progress=note,
                should_stop=should_stop,
            )
        if played.cancelled and not played.outcomes and not should_stop():
            raise RunStalled(f"{self._policy}: no episode could be played; {played.cancelled[0].reason}")
        return self._result(played)

    async def _play(self, ticket: Ticket, client: EnvironmentClient) -> Outcome | Cancelled:
        env = ticket.task.env
        player = EpisodePlayer(self._model, self._prompts, self._options.route == "completions")
        try:
            if env not in self._forms:
                self._forms[env] = await action_form(client, self._config, env)
            trajectory = await play(ticket, client, player, self._prompts, self._config, form=self._forms[env])
        except (NoAnswer, EpisodeFailed, EnvironmentUnavailableError, RequestRejected) as error:
            reason = f"{env}: {error}" if not isinstance(error, NoAnswer) else str(error)
            logger.warning("%s: episode of task %s/%d cancelled: %s", self._policy, env, ticket.task.index, reason)
            self._cancelled += 1
            await self._transcripts.write(self._policy, ticket, player.calls, reason=reason)
            return Cancelled(ticket, reason)
        finally:
            self._usage[ticket.group] = player.usage()
        await self._transcripts.write(self._policy, ticket, player.calls, trajectory)
        return _outcome(trajectory, self._config)

    def _result(self, played: Played) -> EvaluationResult:
        result = summarise_splits(
            self._config,
            played.outcomes,
            played.tickets,
            stream=self._policy,
            cancelled=[episode.ticket.group for episode in played.cancelled],
        )
        splits = {
            name: replace(part, usage=self._total(t.group for t in played.tickets if t.task.split == name))
            for name, part in result.splits.items()
        }
        return replace(result, complete=played.complete, usage=self._total(), splits=splits)

    def _total(self, groups: Iterable[int] | None = None) -> Usage:
        """What the episodes of these groups took; of all groups by default."""
        taken = [self._usage[group] for group in (self._usage if groups is None else groups) if group in self._usage]
        total = Usage(
            requests=sum(usage.requests for usage in taken),
            uncounted=sum(usage.uncounted for usage in taken),
            tokens_in=sum(usage.tokens_in for usage in taken),
            tokens_out=sum(usage.tokens_out for usage in taken),
            not_accepted=tuple(self._model.not_accepted),
        )
        if self._price is None:
            return total
        cost = (total.tokens_in * self._price.prompt + total.tokens_out * self._price.response) / 1e6
        return replace(total, cost=cost)


def _outcome(episode: Trajectory, config: Config) -> Outcome:
    valid = sum(step.valid for step in episode.steps)
    return Outcome.of(episode.ticket, episode.facts, config, steps=len(episode.steps), valid=valid)
