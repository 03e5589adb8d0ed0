"""Templates and parsers from outside: the same door, checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from actors.parsing import ParsedAction
from actors.prompts import Exchange, PromptBuilder
from actors.templates import check
from anchorage.checks.preflight import Start, preflight
from env_servers.protocol import StepResult
from services.config import Config, ConfigError, load_config
from services.config.tree import PromptConfig
from services.errors import PreflightFailed
from services.plugins import PluginError

TEXT = """
    from pydantic import BaseModel
    from actors.parsing import ParsedAction

    class Params(BaseModel):
        greeting: str = "Hello"

    def text(goal, history, steps_taken, state, params: Params):
        past = "".join(f"{one.action}; " for one in history)
        return f"{params.greeting}! {goal}. Step {steps_taken}: {past}{state.observation}"

    class Growing:
        def __init__(self, params):
            self.mark = params.get("mark", "?")

        def opening(self, goal, observation):
            return f"{goal}: {observation}{self.mark}"

        def observation(self, observation):
            return f" / {observation}{self.mark}"

        def response(self, action, begun):
            return f"[{action}]"

    def bracketed(response, admissible, form, params):
        inner = response.strip(params.get("brackets", "[]"))
        return ParsedAction(inner, inner != response)
"""


class Characters:
    """A tokenizer whose tokens are characters."""

    chat_template: str | None = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(dedent(TEXT))
    return tmp_path / "mine.py"


def state(observation: str = "A desk.") -> StepResult:
    facts: dict[str, Any] = {"session": "s", "reward": 0, "terminated": False, "truncated": False, "anchor": ""}
    return StepResult(step=2, observation=observation, admissible=["look"], **facts)


PAST = [Exchange("A door.", "open door", "[open door]", [1, 2]), Exchange("A room.", "look", "[look]", [3])]


def builder(limit: int = 1000, **prompt: object) -> PromptBuilder:
    return PromptBuilder(PromptConfig.model_validate(prompt), Characters(), limit)


def test_a_text_template_is_cut_as_the_built_in_one_is(mine: Path) -> None:
    prompt: dict[str, object] = {"template": f"{mine}:text", "parser": "compact", "params": {"greeting": "Hi"}}
    assert builder(**prompt).build("Find it", PAST, state()).text == "Hi! Find it. Step 2: open door; look; A desk."
    short = builder(40, **prompt).build("Find it", PAST, state())
    assert (short.text, short.truncated) == ("Hi! Find it. Step 2: look; A desk.", True)
    with pytest.raises(PluginError, match=r"has no response\(action, begun\), which a warm start needs"):
        builder(**prompt).response("look")


def test_a_transcript_goes_on_from_the_ids_that_were_sampled(mine: Path) -> None:
    own = builder(template=f"{mine}:Growing", parser=f"{mine}:bracketed", params={"mark": "!"})
    first = own.build("Find it", PAST[:1], state())
    second = own.build("Find it", [*PAST[:1], Exchange("A desk.", "look", "[look]", [7])], state("A pen."))
    assert first.text == "Find it: A door.![open door] / A desk.!"
    assert second.ids[: len(first.ids) + 1] == [*first.ids, 7]
    assert own.response("look") == "[look]"


def test_the_runs_rules_apply_to_what_a_parser_finds(mine: Path) -> None:
    own = builder(template="compact", parser=f"{mine}:bracketed", parser_params={"brackets": "()"})
    assert own.parse("(look)", ["look"], "as_written") == ParsedAction("look", True)
    assert own.parse("( LOOK )", ["look"], "lower_case") == ParsedAction("look", True)
    assert own.parse("(fly)", ["look"], "as_written") == ParsedAction("fly", False)
    assert own.parse("look", ["look"], "as_written") == ParsedAction("look", False)


def test_built_in_ones_pass_the_check() -> None:
    for template in ("think", "compact"):
        assert list(check(PromptConfig(template=template))) == []


def test_a_template_of_ones_own_needs_a_parser(mine: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^prompt.parser: required with prompt.template={mine}:text"):
        load_config(None, [f"prompt.template={mine}:text"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def it(goal, history, state): ...", "must take (goal, history, steps_taken, state), but"),
        ("def it(goal, history, steps_taken, state): return 3", "must return text, got int"),
        ("def it(goal, history, steps_taken, state): return ''", "returned an empty text"),
        ("def it(goal, history, steps_taken, state): return 'a\\ud800'", "half a character: '\\ud800'"),
        ("def it(goal, history, steps_taken, state): raise SystemExit(0)", "SystemExit: 0 (mine.py:1)"),
        ("def it(goal, history, steps_taken, state): return goal.upper()", "AttributeError: 'NoneType' object"),
        ("class it:\n    def opening(self, goal, observation): ...", "the class has no method 'observation'"),
        ("class it:\n    def __init__(self, more): ...", "must take (), but missing a required argument: 'more'"),
        ("class it:\n    def __init__(self): 1 / 0", "ZeroDivisionError: division by zero (mine.py:2)"),
    ],
)
def test_what_is_wrong_with_a_template_is_one_line_of_the_preflight(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "mine.py").write_text(text + "\n")
    config = Config.model_validate({"prompt": {"template": f"{tmp_path}/mine.py:it", "parser": "think"}})
    with pytest.raises(PreflightFailed) as caught:
        preflight(Start(config, models=(Path("models/starter"),)))
    [found] = str(caught.value).splitlines()
    assert found.startswith("prompt.template=")
    assert line in found


def test_what_is_wrong_with_a_parser_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def it(response, admissible, form): return response\n")
    [found] = check(PromptConfig(parser=f"{tmp_path}/mine.py:it"))
    assert "must return actors.parsing.ParsedAction, got ''" in found
    [found] = check(PromptConfig(parser_params={"a": 1}))
    assert "prompt.parser_params.a: prompt.parser=think takes no parameters" in found
