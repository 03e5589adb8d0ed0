"""Prompts of messages: the model's chat template, tool calls as actions, memories, and rows to imitate."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.chat import ChatPrompts
from actors.engine.interface import Sample
from actors.episode import play
from actors.gateway.messages import Message, ToolCall
from actors.gateway.render import HistoryUndecided
from actors.parsing import ParsedAction
from actors.prompts import PromptBuilder, make_prompts
from actors.scripted import Turn, to_examples
from actors.templates import Exchange, check
from env_servers.clients.local import LocalClient
from env_servers.protocol import StepResult
from learner.warmstart import train_tokenizer
from services.config import ConfigError, load_config
from services.config.tree import PromptConfig
from services.schemas import Task, Ticket, VersionSpan
from tests.actors.gateway.families import tokenizer
from tests.env_servers.counting import Counting

GOAL = "find a pen"
CALL_OF_OPEN = ToolCall("open", '{"action": "door"}')


def state(step: int, observation: str = "", admissible: list[str] | None = None, **facts: object) -> StepResult:
    seen = observation or f"You see desk {step}."
    flags: dict[str, Any] = {"reward": 0.0, "terminated": False, "truncated": False, "anchor": ""}
    return StepResult(session="s", step=step, observation=seen, admissible=admissible, facts=facts, **flags)


def sample(tokens: Any, text: str, finished: bool = True) -> Sample:
    ids = tokens.encode(text, add_special_tokens=False) + [tokens.eos_token_id] * finished
    return Sample(ids, [-0.5] * len(ids), (VersionSpan(0, len(ids)),), text, finished)


def call(action: str, name: str = "act") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"action": "{action}"}}}}\n</tool_call>'


def chat(family: str = "chatml", limit: int = 2000, **prompt: object) -> ChatPrompts:
    prompts = make_prompts(PromptConfig.model_validate({"template": "chat"} | prompt), tokenizer(family), limit)
    assert isinstance(prompts, ChatPrompts)
    return prompts


def played(prompts: ChatPrompts, texts: list[str], admissible: list[str] | None = None) -> list[Any]:
    """Prompt, sample and action of each step of an episode."""
    episode, tokens = prompts.begin(), prompts.renderer.tokenizer
    history: list[Exchange] = []
    steps = []
    for number, text in enumerate(texts):
        now = state(number, admissible=admissible)
        prompt, said = episode.build(GOAL, history, now), sample(tokens, text)
        parsed = episode.read(prompt, said, now, "as_written")
        history.append(Exchange(now.observation, parsed.action, text, said.token_ids, parsed.answer, admissible))
        steps.append((prompt, said, parsed))
    return steps


def test_calls_are_actions_and_observations_are_what_the_tool_returns() -> None:
    prompts = chat()
    (first, said, parsed), (second, _, _) = played(prompts, [call("open desk 1"), call("look")])
    assert (parsed.action, parsed.valid) == ("open desk 1", True)
    assert second.ids[: len(first.ids) + len(said.token_ids)] == first.ids + said.token_ids
    assert "Your task is to: find a pen\nYou see desk 0." in first.text
    assert '"name": "act"' in first.text
    assert second.text.startswith(first.text)
    assert second.text.endswith("<tool_response>\nYou see desk 1.\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert prompts.renderer.tokenizer.decode(second.ids) == second.text


@pytest.mark.parametrize(
    ("text", "action", "valid"),
    [
        (call("look"), "look", True),
        (f"I look.\n{call('look')}", "look", True),
        ("look", "look", False),
        (call("fly"), "fly", False),
        (call("look") + "\n" + call("fly"), "look", True),
        (call("look", "jump"), '{"name": "jump", "arguments": {"action": "look"}}', False),
        ('<tool_call>\n{"name": "act", "arguments": {"action": 3}}\n</tool_call>', '{"action": 3}', False),
        ('<tool_call>\n{"name": "act", "arg', '<tool_call>\n{"name": "act", "arg', False),
    ],
)
def test_what_an_answer_does(text: str, action: str, valid: bool) -> None:
    ((_, _, parsed),) = played(chat(), [text], ["look"])
    assert (parsed.action, parsed.valid) == (action, valid)


def test_an_answer_without_a_call_is_followed_by_the_user() -> None:
    _, (second, _, _) = played(chat(), ["look", call("look")])
    assert second.text.endswith("look<|im_end|>\n<|im_start|>user\nYou see desk 1.<|im_end|>\n<|im_start|>assistant\n")


def test_the_environments_own_tools_take_the_place_of_act() -> None:
    tool = {"type": "function", "function": {"name": "open", "parameters": {"type": "object", "properties": {}}}}
    episode, now = chat().begin(), state(0, tools=[tool])
    prompt = episode.build(GOAL, [], now)
    said = sample(tokenizer("chatml"), call("door", "open"))
    assert '"name": "act"' not in prompt.text
    assert episode.read(prompt, said, now, "as_written") == ParsedAction(
        '{"name": "open", "arguments": {"action": "door"}}', True, Message("assistant", tool_calls=(CALL_OF_OPEN,))
    )


def test_what_becomes_of_thoughts_is_chosen() -> None:
    with pytest.raises(HistoryUndecided, match=r"prompt\.history=sampled trains with them, prompt\.history="):
        chat("thinking")
    texts = [f"I think.\n</think>\n\n{call('look')}", f"Hm.\n</think>\n\n{call('look')}", call("look")]
    _, _, (kept, _, _) = played(chat("thinking", history="sampled"), texts)
    assert "I think." in kept.text
    spoken = ["I think.\n</think>\n\nlook", "Hm.\n</think>\n\nlook", call("look")]
    _, _, (dropped, _, _) = played(chat("thinking", history="template"), spoken)
    assert "I think." not in dropped.text
    assert "look<|im_end|>" in dropped.text


def test_a_prompt_that_gets_too_long_loses_half_and_grows_again() -> None:
    prompts = chat(limit=800)
    steps = played(prompts, [call(f"open desk {number}") for number in range(24)])
    continued = [
        now.ids[: len(before.ids) + len(said.token_ids)] == before.ids + said.token_ids
        for (before, said, _), (now, _, _) in itertools.pairwise(steps)
    ]
    assert max(len(prompt.ids) for prompt, _, _ in steps) <= 800
    assert 2 <= continued.count(False) <= 6
    assert steps[-1][0].truncated
    assert "You see desk 23." in steps[-1][0].text


def test_an_observation_that_is_too_long_is_cut() -> None:
    prompts = chat(limit=300)
    prompt = prompts.begin().build(GOAL, [], state(0, "word " * 3000, ["look"] * 500))
    assert len(prompt.ids) <= 300
    assert prompt.truncated
    assert prompt.text.startswith("<|im_start|>system")


def test_a_response_that_is_written_is_the_one_that_is_read() -> None:
    for family, choice in (("chatml", None), ("thinking", "sampled"), ("glm", None), ("llama", None)):
        prompts = chat(family, history=choice)
        episode, now = prompts.begin(), state(0)
        prompt = episode.build(GOAL, [], now)
        ids = [*prompts.response_ids("take pen 1 <|im_end|>"), prompts.renderer.tokenizer.eos_token_id]
        said = Sample(ids, [0.0] * len(ids), (VersionSpan(0, len(ids)),), "", True)
        parsed = episode.read(prompt, said, now, "as_written")
        assert (parsed.action, parsed.valid) == ("take pen 1 <|im_end|>", True)


def test_a_warm_started_policy_gets_whole_conversations_to_imitate() -> None:
    tokens = train_tokenizer(["You see desk 1. open desk 2", '{"name": "act", "arguments": {"action"'] * 9, 400, True)
    prompts = make_prompts(PromptConfig(template="chat"), tokens, 1000)
    turns = [Turn(state(n), GOAL, f"open desk {n}", {f"open desk {n}": 0.5, "look": 0.5}) for n in range(3)]
    (row,) = to_examples(turns, prompts, tokens, only_experts=False)
    text = tokens.decode(row.tokens)
    answer = '<|assistant|><tool_call>{"name": "act", "arguments": {"action": "open desk 1"}}</tool_call><|endoftext|>'
    assert f"{answer}<|tool|>You see desk 2.<|assistant|>" in text
    assert [max(target, key=target.__getitem__) for target in row.targets if target].count(tokens.eos_token_id) == 3


class Caller:
    """Samples the call of `up` whatever it reads; keeps the prompts."""

    def __init__(self, tokens: Any) -> None:
        self._tokens = tokens
        self.saw: list[list[int]] = []

    async def generate(self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int) -> Sample:
        self.saw.append([*prompt_ids])
        return sample(self._tokens, call("up"))


async def test_an_episode_holds_what_the_engine_saw() -> None:
    config = load_config(None, ["env.name=counting", "prompt.template=chat"])
    tokens = tokenizer("chatml")
    engine, client = Caller(tokens), LocalClient(Counting)
    ticket = Ticket(group=0, member=0, group_size=2, task=Task(env="counting", split="train", index=1), seed=7)
    trajectory = await play(ticket, client, engine, make_prompts(config.prompt, tokens, 2000), config)
    assert trajectory.won
    assert [step.prompt_ids.tolist() for step in trajectory.steps] == engine.saw
    assert {(step.action, step.valid) for step in trajectory.steps} == {("up", True)}
    for before, after in itertools.pairwise(trajectory.steps):
        begun = [*before.prompt_ids, *before.response_ids]
        assert after.prompt_ids[: len(begun)].tolist() == begun
        assert tokens.decode(after.prompt_ids) == after.prompt


def test_texts_keep_their_builder() -> None:
    builder = make_prompts(PromptConfig(template="compact"), tokenizer("chatml"), 100)
    assert isinstance(builder, PromptBuilder)
    assert builder.begin() is builder


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["prompt.template=chat", "prompt.parser=think"], "prompt.parser=think: prompt.template=chat has answers"),
        (["prompt.memory=mine:Memory"], "mine:Memory: prompt.reader, prompt.memory and prompt.history are for"),
        (["prompt.template=chat", "prompt.reader=tools"], "must be one of tool, or a plug-in as module:name"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line.replace(".", r"\.")):
        load_config(None, overrides)


MINE = """
class Memory:
    def __init__(self, params): self.seen, self.words = [], params["words"]
    def observe(self, exchange): self.seen.append(exchange.action)
    def recall(self, state): return f"{self.words}: {', '.join(self.seen)}" if self.seen else ""

class Broken(Memory):
    def recall(self, state): return None

class Reader:
    def read(self, answer, state):
        from actors.parsing import ParsedAction
        return ParsedAction(answer.content.upper(), True)
"""


def test_a_memory_sees_each_exchange_once_and_stands_in_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    own = {"memory": f"{tmp_path}/mine.py:Memory", "memory_params": {"words": "Done"}, "history_length": 1}
    prompts = chat(**own, reader=f"{tmp_path}/mine.py:Reader")
    assert list(check(prompts.config)) == []
    for _ in range(2):  # each episode has its own
        *_, (last, _, parsed) = played(prompts, ["look", "go", "open"])
        assert "Done: LOOK, GO\n" in last.text
        assert "You see desk 0." not in last.text
        assert parsed.action == "OPEN"
    broken = prompts.config.model_copy(update={"memory": f"{tmp_path}/mine.py:Broken"})
    assert list(check(broken)) == [f"prompt.memory={tmp_path}/mine.py:Broken: must return str, got None"]
