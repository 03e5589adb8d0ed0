"""Prompt templates: what the policy reads before each action.

`think` is the GiGPO paper's: task, the last observation–action pairs, the observation, the admissible actions, and the
demand for `<think>…</think><action>…</action>`; it goes through the tokenizer's chat template where there is one.
`compact` is for small policies: task, the last actions, the observation, the admissible actions grouped by verb, and
the answer is the action alone.

Invariants
- A prompt never exceeds `max_prompt_tokens`: the oldest history goes first, then the left end of the text.
- The ids are made here, once; nothing downstream tokenises a prompt again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from env_servers.protocol import StepResult
from services.config.tree import PromptConfig
from services.errors import ModelUnavailable
from services.model_folder import check_model_folder

History = Sequence[tuple[str, str]]
"""Earlier (observation, action) pairs of an episode, oldest first."""


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    ids: list[int]


class PromptBuilder:
    """Renders prompts for one tokenizer."""

    def __init__(self, config: PromptConfig, tokenizer: Any, max_prompt_tokens: int) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._max_tokens = max_prompt_tokens
        self._chat = config.template == "think" and bool(getattr(tokenizer, "chat_template", None))

    def build(self, goal: str | None, history: History, result: StepResult) -> Prompt:
        """The prompt for the state `result`, reached after `history`, on the way to `goal`."""
        shown = min(self._config.history_length, len(history))
        while True:
            text = self._render(goal, history, shown, result)
            ids = self._encode(text)
            if len(ids) <= self._max_tokens:
                return Prompt(text, ids)
            if shown == 0:
                return Prompt(text, ids[-self._max_tokens :])
            shown -= 1

    def _render(self, goal: str | None, history: History, shown: int, result: StepResult) -> str:
        recent = history[len(history) - shown :]
        if self._config.template == "compact":
            return render_compact(goal, recent, result)
        return render_think(goal, recent, len(history), result)

    def _encode(self, text: str) -> list[int]:
        if self._chat:
            messages = [{"role": "user", "content": text}]
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        return list(ids)


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
        for number, (observation, action) in enumerate(recent, start=first):
            lines.append(f"[Observation {number}: '{observation}', Action {number}: '{action}']")
    lines.append(f"You are now at step {steps_taken + 1} and your current observation is: {result.observation}")
    if result.admissible is not None:
        lines.append("Your admissible actions are: [" + ", ".join(f"'{a}'" for a in result.admissible) + "].")
    lines.append(
        "Now it is your turn to take an action.\n"
        "First reason step by step about the situation, within <think> </think> tags. "
        "Then choose one admissible action and give it within <action> </action> tags."
    )
    return "\n".join(lines)


def render_compact(goal: str | None, recent: History, result: StepResult) -> str:
    """A short prompt that ends where the action begins."""
    lines = [f"task: {goal}"] if goal else []
    if recent:
        lines.append("did: " + "; ".join(action for _, action in recent))
    lines.append("see: " + " ".join(result.observation.split()))
    if result.admissible is not None:
        lines.append("can: " + "; ".join(group_actions(result.admissible)))
    lines.append("do:")
    return "\n".join(lines)


def group_actions(actions: Sequence[str]) -> list[str]:
    """Actions that share verb and ending written once: `take.. from desk 1: pen 1 pencil 2`."""
    groups = []
    for _, same_verb in itertools.groupby(sorted(actions), key=lambda action: action.split(" ", 1)[0]):
        for ending, commands in itertools.groupby(sorted(same_verb, key=_ending), key=_ending):
            groups.append(_join(list(commands), ending))
    return groups


def _ending(action: str) -> str:
    """What follows the second preposition-like part: `from desk 1` in `take pen 1 from desk 1`."""
    words = action.split()
    for position in range(2, len(words) - 1):
        if words[position] in ("from", "to", "with"):
            return " ".join(words[position:])
    return ""


def _join(commands: list[str], ending: str) -> str:
    if len(commands) == 1:
        return commands[0]
    split = [command.split() for command in commands]
    shared = len(ending.split())
    same = [len(set(column)) == 1 for column in zip(*split, strict=False)]
    prefix = len(list(itertools.takewhile(bool, same)))
    prefix = min(prefix, *(len(words) - shared - 1 for words in split))
    items = (" ".join(words[prefix : len(words) - shared]) for words in split)
    return f"{' '.join(split[0][:prefix])}{' ' + ending if ending else ''}: {' '.join(items)}"


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
