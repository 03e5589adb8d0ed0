from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.parsing import ParsedAction, parse_action
from actors.prompts import Exchange, Prompt, PromptBuilder, load_tokenizer, shortened
from actors.templates import render_think
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


@pytest.mark.parametrize("limit", [1000, 200, 150, 60])
def test_the_turns_of_a_compact_prompt_are_its_text_beginning_and_ending_with_what_is_shown(limit: int) -> None:
    prompt = compact(HISTORY, limit)
    assert "".join(prompt.turns) == prompt.text
    assert len(prompt.turns) % 2 == 1
    said = [exchange.response for exchange in HISTORY]
    assert list(prompt.turns[1::2]) == said[len(said) - len(prompt.turns) // 2 :]
    assert all(shown.endswith("\n>") for shown in prompt.turns[::2])


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


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}", "leaves out the text"),
        ("{{ raise_exception('a system message must come first') }}", "a system message must come first"),
        ("{{ messages[1].content.strip() }}", "cannot write a user's message"),
        ("{% for m in messages %}", "cannot write a user's message"),
    ],
)
def test_a_chat_template_that_cannot_write_the_prompt_is_one_line(model_folder: Path, template: str, told: str) -> None:
    tokenizer = load_tokenizer(model_folder)
    tokenizer.chat_template = template
    with pytest.raises(ModelUnavailable, match=told) as refused:
        PromptBuilder(PromptConfig(template="think"), tokenizer, 1500)
    assert "\n" not in str(refused.value)
    PromptBuilder(PromptConfig(template="compact"), tokenizer, 1500)


LONG = "You see " + ", ".join(f"a thing {number}" for number in range(400)) + ". The end."


@pytest.mark.parametrize("goal", ["find a pen", None])
@pytest.mark.parametrize("actions", [None, ["look", "open desk 1"], [f"go to desk {n}" for n in range(300)]])
def test_a_think_prompt_that_is_too_long_keeps_header_goal_and_end(
    model_folder: Path, goal: str | None, actions: list[str] | None
) -> None:
    tokenizer = load_tokenizer(model_folder)
    tokenizer.chat_template = QWEN3
    builder = PromptBuilder(PromptConfig(template="think"), tokenizer, 1500)
    prompt = builder.build(goal, HISTORY, result(LONG, actions))
    said = tokenizer.decode(prompt.ids)
    assert 1200 < len(prompt.ids) <= 1500
    assert prompt.truncated
    assert said.startswith("<|im_start|>user\nYou are an expert agent")
    assert said.endswith("<action> </action> tags.<|im_end|>\n<|im_start|>assistant\n")
    assert ("Your task is to: find a pen" in said) == (goal is not None)
    assert "current observation is: You see a thing 0" in said
    assert "The end." in said
    assert actions is None or "'look'" in said or "'go to desk 0', " in said
    whole = PromptBuilder(PromptConfig(template="think"), tokenizer, 50_000).build(goal, HISTORY, result(LONG, actions))
    assert not whole.truncated
    assert LONG in whole.text


@pytest.mark.parametrize("limit", [900, 400, 300])
@pytest.mark.parametrize("history", [[], HISTORY[:1], HISTORY])
def test_a_compact_prompt_that_is_too_long_keeps_its_goal_and_end(limit: int, history: list[Exchange]) -> None:
    first = (
        [exchange(f"Welcome. {LONG} Your task: find a pen. {LONG}", history[0].action), *history[1:]] if history else []
    )
    prompt = compact(first, limit, LONG)
    said = "".join(map(chr, prompt.ids))
    assert limit * 0.8 < len(prompt.ids) <= limit
    assert prompt.truncated
    assert "find a pen" in said
    assert said.endswith("The end.\n>")
    assert said == prompt.text


def test_cutting_encodes_little_more_than_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def encode(self: Characters, text: str, add_special_tokens: bool) -> list[int]:
        read.append(len(text))
        return [ord(character) for character in text]

    monkeypatch.setattr(Characters, "encode", encode)
    builder = PromptBuilder(PromptConfig(template="compact"), Characters(), 1000)
    prompt = builder.build("find a pen", HISTORY[:1], result(LONG))
    assert prompt.truncated
    assert 980 <= len(prompt.ids) <= 1000
    assert sum(read) < len(LONG) + 2 * 1000


def test_dropped_history_counts_as_truncated() -> None:
    whole = compact(HISTORY)
    assert not whole.truncated
    assert compact(HISTORY, len(whole.ids) - 1).truncated


def test_shortened_keeps_both_ends_and_what_it_is_told() -> None:
    assert shortened("0123456789", 4) == "01 [...] 89"
    assert shortened("0123456789", 10) == "0123456789"
    assert shortened("0123456789", 0) == "[...]"
    assert "GOAL" in shortened("x" * 100 + "GOAL" + "y" * 100, 10, "GOAL")


@pytest.mark.parametrize("limit", [8, 9, 30, 100])
@pytest.mark.parametrize("template", ["think", "compact"])
def test_no_limit_is_too_small(template: str, limit: int) -> None:
    builder = PromptBuilder(PromptConfig.model_validate({"template": template}), Characters(), limit)
    assert 0 < len(builder.build("g" * 500, HISTORY, result(LONG, ["look"])).ids) <= limit
