"""Prompt templates: what the policy reads before each action.

`think` is the GiGPO paper's: task, the last observation–action pairs, the observation, the admissible actions, and the
demand for `<think>…</think><action>…</action>`; it goes through the tokenizer's chat template where there is one.
`compact` is for small policies: the episode so far as a terminal would show it, and the answer is the action alone.

Invariants
- A prompt never exceeds `max_prompt_tokens`: the oldest history goes first, then the left end of the text.
- The ids are made here, once; nothing downstream tokenises a prompt again.
- What the chat template writes of the answer itself, such as Qwen3's `<think>`, is known as `begun`: it is the
  response's beginning for whoever reads it.
- A `compact` prompt begins with the ids of the one before it and of its response, as they were sampled, until the
  limit is met. So the engine's prefix cache computes each token once, and so does the learner.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from env_servers.protocol import StepResult
from services.config.tree import PromptConfig
from services.errors import ModelUnavailable
from services.model_folder import check_model_folder


@dataclass(frozen=True, slots=True)
class Exchange:
    """An earlier step of the episode: what was seen, what was done, and the sampled response in text and tokens."""

    observation: str
    action: str
    response: str = ""
    response_ids: Sequence[int] = ()


History = Sequence[Exchange]
"""Earlier steps of an episode, oldest first."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text and ids of a prompt; `begun` is what its end already holds of the answer."""

    text: str
    ids: list[int]
    begun: str = ""


class PromptBuilder:
    """Renders prompts for one tokenizer."""

    def __init__(self, config: PromptConfig, tokenizer: Any, max_prompt_tokens: int) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._max_tokens = max_prompt_tokens
        self._chat = config.template == "think" and bool(getattr(tokenizer, "chat_template", None))
        self._switches = {} if config.thinking is None else {"enable_thinking": config.thinking}
        self._begun = self._answer_begun() if self._chat else ""
        self._opening = functools.lru_cache(maxsize=1024)(self._encode_opening)
        self._seen = functools.lru_cache(maxsize=4096)(self._encode_seen)

    def build(self, goal: str | None, history: History, result: StepResult) -> Prompt:
        """The prompt for the state `result`, reached after `history`, on the way to `goal`."""
        if self._config.template == "compact":
            return self._compact(goal, history, result)
        shown = min(self._config.history_length, len(history))
        while True:
            text = render_think(goal, history[len(history) - shown :], len(history), result)
            ids = self._encode(text)
            if len(ids) <= self._max_tokens:
                return Prompt(text, list(ids), self._begun)
            if shown == 0:
                return Prompt(text, list(ids[-self._max_tokens :]), self._begun)
            shown -= 1

    def response(self, action: str) -> str:
        """What a policy without a thought writes after a prompt to take `action`."""
        if self._config.template == "compact":
            return f" {action}"
        thought = "</think>" if self._begun else "<think></think>"
        return f"{'' if '</think>' in self._begun else thought}<action>{action}</action>"

    def _compact(self, goal: str | None, history: History, result: StepResult) -> Prompt:
        """First what was seen at the start, then response and observation in turn.

        Beyond the limit the older half of the exchanges goes at once, so that the prompts after that are prefixes of
        one another again.
        """
        observations = [*(exchange.observation for exchange in history), result.observation]
        opening, opening_ids = self._opening(goal, observations[0])
        turns = [
            (exchange, self._seen(observation)) for exchange, observation in zip(history, observations[1:], strict=True)
        ]
        while True:
            text, ids = opening, list(opening_ids)
            for exchange, (seen, seen_ids) in turns:
                text += exchange.response + seen
                ids += exchange.response_ids
                ids += seen_ids
            if len(ids) <= self._max_tokens or len(turns) <= 1:
                return Prompt(text, ids[-self._max_tokens :])
            turns = turns[len(turns) // 2 :]

    def _encode_opening(self, goal: str | None, observation: str) -> tuple[str, tuple[int, ...]]:
        opening = render_opening(goal, observation)
        return opening, self._encode(opening)

    def _encode_seen(self, observation: str) -> tuple[str, tuple[int, ...]]:
        seen = render_observation(observation)
        return seen, self._encode(seen)

    def _encode(self, text: str) -> tuple[int, ...]:
        if self._chat:
            ids = self._tokenizer.apply_chat_template(
                _asked(text), add_generation_prompt=True, return_dict=False, **self._switches
            )
        else:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        return tuple(ids)

    def _answer_begun(self) -> str:
        """The thought that the template opens, or opens and closes, before the model writes anything."""
        asked, answered = (
            self._tokenizer.apply_chat_template(
                _asked("?"), add_generation_prompt=begin, tokenize=False, **self._switches
            )
            for begin in (False, True)
        )
        _, thought, rest = answered[len(asked) :].partition("<think>")
        return str(thought + rest)


def _asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def render_think(goal: str | None, recent: History, steps_taken: int, result: StepResult) -> str:
    """The paper's prompt (arXiv 2505.10978, appendix on prompts)."""
    lines = ["You are an expert agent acting in a text environment."]
    if goal:
        lines.append(f"Your task is to: {goal}")
    if recent:
        lines.append(
            f"Before this step you have taken {steps_taken} step(s). "
            f"The last {len(recent)} observations and the actions you took on them:"
        )
        first = steps_taken - len(recent) + 1
        for number, past in enumerate(recent, start=first):
            lines.append(f"[Observation {number}: '{past.observation}', Action {number}: '{past.action}']")
    lines.append(f"You are now at step {steps_taken + 1} and your current observation is: {result.observation}")
    if result.admissible is not None:
        lines.append("Your admissible actions are: [" + ", ".join(f"'{a}'" for a in result.admissible) + "].")
    lines.append(
        "Now it is your turn to take an action.\n"
        "First reason step by step about the situation, within <think> </think> tags. "
        "Then choose one admissible action and give it within <action> </action> tags."
    )
    return "\n".join(lines)


def render_opening(goal: str | None, observation: str) -> str:
    """How a `compact` prompt begins: the first observation, after the goal where the observation does not say it."""
    told = f"{goal}\n" if goal and goal not in observation else ""
    return f"{told}{_one_line(observation)}\n>"


def render_observation(observation: str) -> str:
    """What a `compact` prompt shows after a response."""
    return f"\n{_one_line(observation)}\n>"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a local Hugging Face folder.

    Raises:
        ModelUnavailable: no such folder, or no tokenizer in it.
    """
    from transformers import AutoTokenizer

    check_model_folder(path)
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"cannot load the tokenizer of {path}: {str(error).splitlines()[0]}") from None
