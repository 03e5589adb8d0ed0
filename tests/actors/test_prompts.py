from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.parsing import ParsedAction, parse_action
from actors.prompts import Exchange, Prompt, PromptBuilder, load_tokenizer, render_think
from env_servers.protocol import StepResult
from services.config.tree import PromptConfig
from services.errors import ModelUnavailable


class Characters:
    """A tokenizer whose tokens are characters."""

    chat_template: str | None = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]


class Chat(Characters):
    chat_template = "wraps"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool = True, **_: Any) -> Any:
        if not tokenize:
            return messages[0]["content"]
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


def exchange(observation: str, action: str) -> Exchange:
    response = f" {action}~"
    return Exchange(observation, action, response, [ord(character) for character in response])


HISTORY = [
    exchange("first view", "look"),
    exchange("second view", "go to desk 1"),
    exchange("third\n view", "open desk 1"),
]


def compact(history: list[Exchange], limit: int = 1000, observation: str = "You see a desk 1.") -> Prompt:
    builder = PromptBuilder(PromptConfig(template="compact"), Characters(), limit)
    return builder.build("find a pen", history, result(observation))


def test_compact_shows_the_episode_so_far_and_ends_where_the_answer_begins() -> None:
    prompt = compact(HISTORY)
    assert prompt.text == (
        "find a pen\nfirst view\n> look~\nsecond view\n> go to desk 1~\n"
        "third view\n> open desk 1~\nYou see a desk 1.\n>"
    )
    assert prompt.ids == [ord(character) for character in prompt.text]


def test_compact_does_not_repeat_a_goal_that_the_observation_tells() -> None:
    assert compact([], observation="You must find a pen here.").text == "You must find a pen here.\n>"


def test_a_compact_prompt_goes_on_from_the_one_before_it() -> None:
    before = compact(HISTORY[:2], observation=HISTORY[2].observation)
    after = compact(HISTORY)
    begun = [*before.ids, *HISTORY[2].response_ids]
    assert after.ids[: len(begun)] == begun


def test_compact_reads_the_response_as_it_was_sampled() -> None:
    sampled = Exchange("first view", "look", " look", [7, 7])
    assert compact([sampled]).ids.count(7) == 2


def test_think_shows_pairs_with_their_step_numbers() -> None:
    text = render_think("find a pen", HISTORY[-2:], 3, result(admissible=["look"]))
    assert "taken 3 step(s)" in text
    assert "[Observation 2: 'second view', Action 2: 'go to desk 1']" in text
    assert "[Observation 3: 'third\n view', Action 3: 'open desk 1']" in text
    assert "You are now at step 4" in text
    assert "['look']" in text


def test_think_goes_through_the_chat_template() -> None:
    prompt = PromptBuilder(PromptConfig(template="think"), Chat(), 10_000).build(None, [], result())
    assert (prompt.ids[0], prompt.ids[-1]) == (1, 2)


@pytest.mark.parametrize("limit", [120, 90, 40, 10])
def test_a_prompt_never_exceeds_its_limit_and_keeps_its_end(limit: int) -> None:
    prompt = compact(HISTORY, limit)
    assert len(prompt.ids) <= limit
    assert prompt.ids[-7:] == [ord(c) for c in "sk 1.\n>"]


def test_beyond_the_limit_the_older_half_goes_and_the_opening_stays() -> None:
    history = [*HISTORY, exchange("fourth view", "help")]
    kept = "find a pen\nfirst view\n> open desk 1~\nfourth view\n> help~\nYou see a desk 1.\n>"
    assert compact(history, len(compact(history).text) - 1).text == kept
    assert compact(history, len(kept)).text == kept


def test_think_drops_its_oldest_history_first() -> None:
    config = PromptConfig(template="think", history_length=3)
    whole = PromptBuilder(config, Characters(), 10_000).build("find a pen", HISTORY, result()).text
    cut = PromptBuilder(config, Characters(), len(whole) - 1).build("find a pen", HISTORY, result()).text
    assert "[Observation 1" in whole
    assert "[Observation 1" not in cut
    assert "[Observation 2" in cut


def test_missing_model_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"model\.path .* holds no config\.json"):
        load_tokenizer(tmp_path)


QWEN3 = (
    r"{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    r"{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
ALWAYS_THINKING = QWEN3.replace(r"\n' }}{% if enable", r"\n<think>\n' }}{% if enable")


@pytest.mark.parametrize(
    ("template", "thinking", "begun", "response"),
    [
        (QWEN3, None, "", "<think>hm</think><action>look</action>"),
        (QWEN3, True, "", "<think>hm</think>\n\n<action>look</action>"),
        (QWEN3, False, "<think>\n\n</think>\n\n", "<action>look</action>"),
        (ALWAYS_THINKING, None, "<think>\n", "hm\n</think>\n\n<action>look</action>"),
    ],
)
def test_a_thought_that_the_chat_template_opened_belongs_to_the_response(
    model_folder: Path, template: str, thinking: bool | None, begun: str, response: str
) -> None:
    tokenizer = load_tokenizer(model_folder)
    tokenizer.chat_template = template
    builder = PromptBuilder(PromptConfig(template="think", thinking=thinking), tokenizer, 1000)
    prompt = builder.build(None, [], result(admissible=["look"]))
    assert prompt.begun == begun
    assert tokenizer.decode(prompt.ids).endswith(f"assistant\n{begun}")
    assert parse_action("think", prompt.begun + response, ["look"], "admissible") == ParsedAction("look", True)
    if begun:
        assert not parse_action("think", response, ["look"], "admissible").valid
