"""Build the prompt before each action: a template's text (`actors.templates`), cut to fit, as token ids.

A text template is rendered anew for each step and goes through the tokenizer's chat template where there is one. A
transcript is written on: each prompt begins with the one before it.

Invariants
- A prompt never exceeds `max_prompt_tokens`. The oldest history is dropped first, then the middle of the observation,
  then the middle of the admissible actions; the chat template's header, the task and the end stay, and `truncated` is
  set.
- Text from an environment stays text: it never becomes a control token (`tokens.py`).
- The tokenizer's prefix, such as BOS, occurs exactly once.
- A prompt is tokenised here, once, and never again downstream.
- What the chat template itself writes of the response, such as Qwen3's `<think>`, is returned as `begun` and counts as
  the beginning of the response.
- The prompt of a transcript begins with the ids of the one before it and of its response, as they were sampled, until
  the limit is met. So the engine's prefix cache computes each token once, and so does the learner.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from actors.engine.interface import Sample
from actors.gateway.messages import Message
from actors.parsing import ParsedAction, parse_action
from actors.templates import Exchange as Exchange
from actors.templates import History, Transcript, load_parser, load_template
from actors.tokens import PromptTokens
from env_servers.protocol import ActionForm, StepResult
from services.config.tree import PromptConfig
from services.errors import ModelUnavailable, first_line
from services.model_folder import check_model_folder
from services.plugins import PluginError

PROBE = "Is this text in the prompt?"
REMEDY = "give the model's folder one that takes a single user message whose content is a text, or none"

CUT = " [...] "
FEWEST_CHARS = 256
"""Admissible actions are cut before an observation gets shorter than this."""
CUTS = 8
"""Most attempts to find how much of an observation fits."""
SLACK = 64
"""The search ends when less than 1 / SLACK of the limit is free: each attempt encodes the whole prompt."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text and ids of a prompt.

    `begun`: the part of the response that the prompt ends with. `truncated`: something was cut to fit. `turns`: of a
    transcript, its text in parts, what the policy was shown and what it said in turn; empty otherwise.
    """

    text: str
    ids: list[int]
    begun: str = ""
    truncated: bool = False
    turns: tuple[str, ...] = ()


class EpisodePrompts(Protocol):
    """The prompts of one episode."""

    def build(self, goal: str | None, history: History, result: StepResult) -> Prompt:
        """The prompt for the state `result`, reached after `history`, on the way to `goal`."""

    def read(self, prompt: Prompt, sample: Sample, state: StepResult, form: ActionForm) -> ParsedAction:
        """The action of what was sampled after a prompt."""

    def answer(self, action: str) -> Message | None:
        """What a policy without a thought answers to take `action`, where responses are messages."""

    def response(self, action: str) -> str:
        """The same as text, without its end. Raises PluginError where the template does not say."""

    def response_ids(self, action: str) -> list[int]:
        """Its ids."""


class Prompts(Protocol):
    """Makes the prompts of episodes, for one tokenizer."""

    def begin(self) -> EpisodePrompts:
        """The prompts of one episode."""


class PromptBuilder:
    """Renders prompts of texts for one tokenizer.

    Raises:
        PluginError: the template or the parser cannot be loaded.
        ModelUnavailable: its chat template cannot write a user's message, or its control tokens cannot be renamed.
    """

    def __init__(self, config: PromptConfig, tokenizer: Any, max_prompt_tokens: int) -> None:
        self._config = config
        self._template = load_template(config)
        if self._template.chat is not None:
            raise PluginError(
                f"{self._template.label}: writes messages with tool calls, which only local policies play; for API "
                "models set think, compact or a template of texts"
            )
        self._parser = load_parser(config)
        self._tokenizer = tokenizer
        self._tokens = PromptTokens(tokenizer)
        self._max_tokens = max_prompt_tokens
        self._chat = self._template.transcript is None and bool(getattr(tokenizer, "chat_template", None))
        self._switches = {} if config.thinking is None else {"enable_thinking": config.thinking}
        self._begun = self._answer_begun() if self._chat else ""
        self._opening = functools.lru_cache(maxsize=1024)(self._encode_opening)
        self._seen = functools.lru_cache(maxsize=4096)(self._encode_seen)

    def build(self, goal: str | None, history: History, result: StepResult) -> Prompt:
        """The prompt for the state `result`, reached after `history`, on the way to `goal`."""
        if (transcript := self._template.transcript) is not None:
            return self._continued(transcript, goal, history, result)
        return self._rendered(goal, history, result)

    def begin(self) -> PromptBuilder:
        """The prompts of one episode: these, since nothing is kept from one prompt to the next."""
        return self

    def read(self, prompt: Prompt, sample: Sample, state: StepResult, form: ActionForm) -> ParsedAction:
        """The action of a sampled response."""
        return self.parse(prompt.begun + sample.text, state.admissible, form)

    def answer(self, action: str) -> Message | None:
        """None: responses are texts, not messages."""
        return None

    def parse(self, response: str, admissible: Sequence[str] | None, form: ActionForm) -> ParsedAction:
        """The action of a response (with what the prompt had begun of it); see `actors.parsing.parse_action`."""
        return parse_action(self._parser, response, admissible, self._config.validity, form)

    def response(self, action: str) -> str:
        """What a policy without a thought writes after a prompt to take `action`.

        Raises:
            PluginError: the template does not say.
        """
        if self._template.response is None:
            raise PluginError(f"{self._template.label}: has no response(action, begun), which a warm start needs")
        return self._template.response(action, self._begun)

    def response_ids(self, action: str) -> list[int]:
        """Ids of that response, without EOS; what the action says is text."""
        return list(self._tokens.encode(self.response(self._tokens.escape(action))))

    def _rendered(self, goal: str | None, history: History, result: StepResult) -> Prompt:
        """The text template's prompt, with as much of the history as is asked for and fits."""
        most = min(self._config.history_length, len(history))

        def render(shown: int, state: StepResult) -> Prompt:
            recent = history[len(history) - shown :]
            escape = self._tokens.escape
            text = self._template.render(
                escape(goal) if goal else goal,
                [replace(past, observation=escape(past.observation), action=escape(past.action)) for past in recent],
                len(history),
                _escaped(state, escape),
            )
            return Prompt(self._tokens.unescape(text), list(self._encode(text)), self._begun)

        for shown in range(most, -1, -1):
            prompt = render(shown, result)
            if len(prompt.ids) <= self._max_tokens:
                return replace(prompt, truncated=shown < most)
        return replace(self._cut_rendered(lambda state: render(0, state), result, prompt), truncated=True)

    def _cut_rendered(self, render: Callable[[StepResult], Prompt], result: StepResult, longest: Prompt) -> Prompt:
        """The prompt with as much of the observation, and then of the admissible actions, as fits.

        `longest`: the prompt with all of both, which does not fit.

        Example: an observation of 4,000 characters and 200 actions.
            1. All actions, as much of the observation as fits: done if that is at least FEWEST_CHARS characters.
            2. FEWEST_CHARS of the observation, as many actions as fit from both ends of the list.
            3. No observation, as many actions as fit.
            4. Neither; then tokens are cut from the middle of the text.
        """
        seen, actions = result.observation, result.admissible or []

        def with_chars(count: int) -> StepResult:
            return result.model_copy(update={"observation": shortened(seen, count)})

        def shows(count: int) -> Prompt:
            return longest if count >= len(seen) else render(with_chars(count))

        prompt, chars = self._largest(shows, len(seen))
        least = min(FEWEST_CHARS, len(seen))
        if prompt is not None and (chars >= least or not actions):
            return prompt
        for chars in (least, 0):

            def with_actions(count: int, chars: int = chars) -> StepResult:
                return with_chars(chars).model_copy(update={"admissible": _fewer(actions, count)})

            fewer, _ = self._largest(lambda count: render(with_actions(count)), len(actions))
            if fewer is not None:
                return fewer
        return self._cut_middle(render(with_actions(0)))

    def _largest(self, render: Callable[[int], Prompt], whole: int) -> tuple[Prompt | None, int]:
        """About the largest part of `whole` that fits, with its prompt; None where not even 0 fits."""
        limit = self._max_tokens
        best, low, high = render(0), 0, whole
        if len(best.ids) > limit:
            return None, 0
        longest = render(whole)
        if len(longest.ids) <= limit:
            return longest, whole
        # Regula falsi: tokens are about proportional to characters. It aims at the middle of the accepted range.
        used, over, slack = len(best.ids), len(longest.ids), limit // SLACK
        for _ in range(CUTS):
            guess = low + (high - low) * (limit - slack // 2 - used) // (over - used)
            if used >= limit - slack or not low < guess < high:
                break
            prompt = render(guess)
            if len(prompt.ids) <= limit:
                best, low, used = prompt, guess, len(prompt.ids)
            else:
                high, over = guess, len(prompt.ids)
        return best, low

    def _cut_middle(self, prompt: Prompt) -> Prompt:
        """Last resort: cut tokens from the middle. A quarter of the limit keeps the beginning, the rest the end."""
        limit = self._max_tokens
        if len(prompt.ids) <= limit:
            return prompt
        first = limit // 4
        return replace(prompt, ids=[*prompt.ids[:first], *prompt.ids[len(prompt.ids) - limit + first :]])

    def _continued(self, transcript: Transcript, goal: str | None, history: History, result: StepResult) -> Prompt:
        """First what was seen at the start, then response and observation in turn.

        Beyond the limit the older half of the exchanges goes at once, so that the prompts after that are prefixes of
        one another again.

        Example, with room for four turns: the prompts after 3, 4, 5, 6 and 7 steps show the opening and the turns
            1 2 3   1 2 3 4   3 4 5   3 4 5 6   5 6 7
        where dropping one turn at a time would give 2 3 4 5, 3 4 5 6, …, no one a prefix of the next.
        """
        observations = [*(exchange.observation for exchange in history), result.observation]
        opening, opening_ids = self._opening(goal, observations[0])
        turns = [
            (exchange, self._seen(observation)) for exchange, observation in zip(history, observations[1:], strict=True)
        ]
        while True:
            texts, ids = [opening], list(opening_ids)
            for exchange, (seen, seen_ids) in turns:
                texts += (exchange.response, seen)
                ids += exchange.response_ids
                ids += seen_ids
            if len(ids) <= self._max_tokens:
                return Prompt("".join(texts), ids, truncated=len(turns) < len(history), turns=tuple(texts))
            if len(turns) <= 1:
                return replace(self._cut_transcript(goal, observations, history[-1:]), truncated=True)
            turns = turns[len(turns) // 2 :]

    def _cut_transcript(self, goal: str | None, observations: Sequence[str], turn: History) -> Prompt:
        """The opening and the last turn with what fits of both observations; else goal and last observation."""
        first, last = observations[0], observations[-1]

        def both(count: int) -> Prompt:
            # Whole and empty openings recur and are cached; openings that are cut in between hardly ever recur.
            room = max(0, count - len(last))
            encode = self._encode_opening if 0 < room < len(first) else self._opening
            opening, ids = encode(goal, shortened(first, room, goal))
            seen, seen_ids = self._seen(last) if count >= len(last) else self._encode_seen(shortened(last, count))
            texts = (opening, turn[0].response, seen)
            return Prompt("".join(texts), [*ids, *turn[0].response_ids, *seen_ids], turns=texts)

        def alone(count: int) -> Prompt:
            opening, ids = self._encode_opening(goal, shortened(last, count, goal))
            return Prompt(opening, list(ids), turns=(opening,))

        prompt, chars = self._largest(both, len(first) + len(last)) if turn else (None, 0)
        if prompt is None or chars < min(FEWEST_CHARS, len(last)):
            other, of_last = self._largest(alone, len(last))
            prompt = other if other is not None and of_last > chars else prompt
        return self._cut_middle(alone(len(last))) if prompt is None else prompt

    def _encode_opening(self, goal: str | None, observation: str) -> tuple[str, tuple[int, ...]]:
        opening = self._of_transcript("opening", goal, observation)
        return opening, self._tokens.begin(self._tokens.encode(self._tokens.escape(opening)))

    def _encode_seen(self, observation: str) -> tuple[str, tuple[int, ...]]:
        seen = self._of_transcript("observation", observation)
        return seen, self._tokens.encode(self._tokens.escape(seen))

    def _of_transcript(self, part: str, *arguments: object) -> str:
        return self._template.text(getattr(self._template.transcript, part), *arguments)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Ids of a rendered prompt, whose foreign parts are escaped."""
        tokens = self._tokens
        if not self._chat:
            return tokens.begin(tokens.encode(text))
        chat = functools.partial(
            self._tokenizer.apply_chat_template, _asked(text), add_generation_prompt=True, **self._switches
        )
        if not tokens.known:
            return tuple(chat(return_dict=False))
        return tokens.begin(tokens.encode(chat(tokenize=False)))

    def _answer_begun(self) -> str:
        """The thought that the chat template opens, or opens and closes, before the model writes anything."""
        from jinja2 import TemplateError

        try:
            asked, answered = (
                self._tokenizer.apply_chat_template(
                    _asked(PROBE), add_generation_prompt=begin, tokenize=False, **self._switches
                )
                for begin in (False, True)
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ModelUnavailable(f"the chat template cannot write a user's message: {error}; {REMEDY}") from error
        if PROBE not in asked:  # one for lists of parts writes nothing of a text, and says nothing
            raise ModelUnavailable(f"the chat template leaves out the text of a user's message; {REMEDY}")
        _, thought, rest = answered[len(asked) :].partition("<think>")
        return str(thought + rest)


def _escaped(state: StepResult, escape: Callable[[str], str]) -> StepResult:
    observation, actions = escape(state.observation), state.admissible
    if actions is not None:
        actions = [escape(action) for action in actions]
    if observation == state.observation and actions == state.admissible:
        return state
    return state.model_copy(update={"observation": observation, "admissible": actions})


def shortened(text: str, chars: int, keep: str | None = None) -> str:
    """About `chars` characters of a text, from its two ends; `keep`, where it is in the text, stays whole.

    Example: `shortened("0123456789", 4)` is `"01 [...] 89"`.
    """
    if chars >= len(text):
        return text
    if keep and keep in text:
        before, _, after = text.partition(keep)
        return (
            shortened(before, chars * len(before) // len(text))
            + keep
            + shortened(after, chars * len(after) // len(text))
        )
    first = chars // 2
    return f"{text[:first]}{CUT}{text[len(text) - chars + first :]}".strip(" ")


def _fewer(actions: Sequence[str], count: int) -> list[str]:
    """The first and the last of the actions, `count` of them."""
    first = (count + 1) // 2
    return [
        *actions[:first],
        *([CUT.strip()] if count < len(actions) else []),
        *actions[len(actions) - count + first :],
    ]


def _asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def make_prompts(config: PromptConfig, tokenizer: Any, max_prompt_tokens: int) -> Prompts:
    """Prompts of messages or of texts, as the run's template has them.

    Raises:
        PluginError: the template, or what makes actions of responses, cannot be loaded.
        ModelUnavailable: the model's chat template or tokenizer is unsuitable.
        HistoryUndecided: the chat template drops thoughts, and `prompt.history` is not set.
    """
    if load_template(config).chat is None:
        return PromptBuilder(config, tokenizer, max_prompt_tokens)
    from actors.chat import ChatPrompts

    return ChatPrompts(config, tokenizer, max_prompt_tokens)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a local Hugging Face folder.

    Raises:
        ModelUnavailable: no such folder, or no tokenizer in it.
    """
    from transformers import AutoTokenizer

    check_model_folder(path)
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever files of somebody else's end in
        raise ModelUnavailable(f"cannot load the tokenizer of {path}: {first_line(error)}") from None
