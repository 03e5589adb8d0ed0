"""The prompt of the examples: accepted before a run, and what its two functions make of an episode."""

from __future__ import annotations

import pytest

from actors.parsing import ParsedAction
from actors.prompts import Exchange, PromptBuilder
from actors.templates import check
from env_servers.protocol import StepResult
from services.config import Config, load_config
from tests.processes import ROOT

FILE = ROOT / "examples" / "custom_prompt.py"
STATE = StepResult(
    session="s",
    step=2,
    observation="The desk is open.",
    reward=0.0,
    terminated=False,
    truncated=False,
    anchor="",
    admissible=["look", "take pen 1"],
)
PAST = [Exchange("A room.", "look"), Exchange("A desk.", "open desk 1")]


class Characters:
    """A tokenizer whose tokens are characters."""

    chat_template: str | None = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]


def config(*overrides: str) -> Config:
    names = [f"prompt.template={FILE}:react", f"prompt.parser={FILE}:last_line"]
    return load_config(ROOT / "configs" / "alfworld.yaml", [*names, *overrides])


def builder(*overrides: str, limit: int = 1000) -> PromptBuilder:
    return PromptBuilder(config(*overrides).prompt, Characters(), limit)


def test_it_passes_the_checks_before_a_run() -> None:
    assert [*check(config().prompt)] == []
    (problem,) = check(config("prompt.params.rule=x").prompt)
    assert "prompt.params.rule" in problem
    assert "did you mean role?" in problem


def test_the_policy_reads_task_history_state_and_actions() -> None:
    prompt = builder("prompt.params.role=You tidy.").build("find a pen", PAST, STATE)
    assert prompt.text.splitlines() == [
        "You tidy.",
        "Task: find a pen",
        "Observation: A room.",
        "Action: look",
        "Observation: A desk.",
        "Action: open desk 1",
        "Observation: The desk is open.",
        "Possible actions: look; take pen 1",
        "This is step 3. Write a thought, then one last line: Action: the action",
    ]


def test_a_long_prompt_loses_the_oldest_step() -> None:
    prompt = builder(limit=240).build("find a pen", PAST, STATE)
    assert prompt.truncated
    assert "A room." not in prompt.text
    assert "A desk." in prompt.text


@pytest.mark.parametrize(
    ("response", "action", "valid"),
    [
        ("The pen is here.\nAction: take pen 1", "take pen 1", True),
        ("Action: look\n", "look", True),
        ("Action: look\nAction: take pen 1", "take pen 1", True),
        ("Action: fly", "fly", False),
        ("I take the pen.", "I take the pen.", False),
        ("Action: look\nand then?", "Action: look\nand then?", False),
        ("Action:", "Action:", False),
    ],
)
def test_the_last_line_is_the_action(response: str, action: str, valid: bool) -> None:
    found = builder().parse(response, STATE.admissible, "as_written")
    assert found == ParsedAction(action, valid)
