from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.prompts import PromptBuilder, group_actions, load_tokenizer, render_think
from env_servers.protocol import StepResult
from services.config.tree import PromptConfig
from services.errors import ModelUnavailable

ACTIONS = [
    "go to desk 1",
    "go to shelf 2",
    "look",
    "move pen 1 to desk 1",
    "take mug 1 from desk 1",
    "take pen 2 from desk 1",
    "take cd 1 from shelf 2",
]


class Characters:
    """A tokenizer whose tokens are characters."""

    chat_template: str | None = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]


class Chat(Characters):
    chat_template = "wraps"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        return [1, *self.encode(messages[0]["content"], False), 2]


def result(observation: str = "You see a desk 1.", admissible: list[str] | None = None) -> StepResult:
    return StepResult(
        session="s",
        step=3,
        observation=observation,
        reward=0,
        terminated=False,
        truncated=False,
        admissible=admissible,
        anchor="",
    )


HISTORY = [("first view", "look"), ("second view", "go to desk 1"), ("third view", "open desk 1")]


def test_actions_of_one_verb_and_ending_are_written_once() -> None:
    assert group_actions(ACTIONS) == [
        "go to: desk 1 shelf 2",
        "look",
        "move pen 1 to desk 1",
        "take from desk 1: mug 1 pen 2",
        "take cd 1 from shelf 2",
    ]


def test_grouping_does_not_depend_on_the_order() -> None:
    assert group_actions(ACTIONS[::-1]) == group_actions(ACTIONS)


def test_compact_shows_the_last_actions_and_ends_where_the_answer_begins() -> None:
    builder = PromptBuilder(PromptConfig(template="compact", history_length=2), Characters(), 1000)
    prompt = builder.build("find a pen", HISTORY, result(admissible=["look", "help"]))
    assert prompt.text == (
        "task: find a pen\ndid: go to desk 1; open desk 1\nsee: You see a desk 1.\ncan: help; look\ndo:"
    )
    assert prompt.ids == [ord(character) for character in prompt.text]


def test_think_shows_pairs_with_their_step_numbers() -> None:
    text = render_think("find a pen", HISTORY[-2:], 3, result(admissible=["look"]))
    assert "taken 3 step(s)" in text
    assert "[Observation 2: 'second view', Action 2: 'go to desk 1']" in text
    assert "[Observation 3: 'third view', Action 3: 'open desk 1']" in text
    assert "You are now at step 4" in text
    assert "['look']" in text


def test_think_goes_through_the_chat_template() -> None:
    prompt = PromptBuilder(PromptConfig(template="think"), Chat(), 10_000).build(None, [], result())
    assert (prompt.ids[0], prompt.ids[-1]) == (1, 2)


@pytest.mark.parametrize("limit", [120, 90, 40, 10])
def test_a_prompt_never_exceeds_its_limit_and_keeps_its_end(limit: int) -> None:
    builder = PromptBuilder(PromptConfig(template="compact", history_length=3), Characters(), limit)
    prompt = builder.build("find a pen", HISTORY, result(admissible=["look"]))
    assert len(prompt.ids) <= limit
    assert prompt.ids[-3:] == [ord(c) for c in "do:"]


def test_the_oldest_history_goes_first() -> None:
    config = PromptConfig(template="compact", history_length=3)
    whole = PromptBuilder(config, Characters(), 1000).build("find a pen", HISTORY, result()).text
    cut = PromptBuilder(config, Characters(), len(whole) - 1).build("find a pen", HISTORY, result()).text
    assert cut == whole.replace("look; ", "")


def test_missing_model_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"model\.path .* holds no config\.json"):
        load_tokenizer(tmp_path)
