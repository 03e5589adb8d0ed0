from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actors.parsing import is_admissible, parse_action, shaped
from env_servers.protocol import FREE_TEXT

ADMISSIBLE = ["go to desk 1", "look"]


@pytest.mark.parametrize(
    ("response", "action", "valid"),
    [
        ("<think>hm</think><action>look</action>", "look", True),
        ("<think>a\nb</think>\n<action>go to desk 1</action>\n", "go to desk 1", True),
        ("<think>a\nb</think>\n<action> Go to  Desk 1 </action>\n", " Go to  Desk 1 ", False),
        ("<think>or <action>look</action>?</think><action>go to desk 1</action>", "go to desk 1", True),
        ("<think>x</think><action>fly</action><think>y</think><action>look</action>", "look", False),
        ("<think>x</think><action>look</action> That is it.", "look", False),
        ("<action>look</action>", "look", False),
        ("<think>x</think><action>look</action><action>look</action>", "look", False),
        ("<think>x</think><action>fly</action>", "fly", False),
        ("<think>x</think><action></action>", "", False),
        ("no tags at all", "no tags at all", False),
        ("<think>never closed <action>look</action>", "look", False),
    ],
)
def test_think(response: str, action: str, valid: bool) -> None:
    parsed = parse_action("think", response, ADMISSIBLE, "admissible")
    assert (parsed.action, parsed.valid) == (action, valid)


@pytest.mark.parametrize(
    ("response", "action", "valid"),
    [
        (" look", "look", True),
        ("look", "look", True),
        (" go  to desk 1", "go  to desk 1", False),
        ("look\nlook", "look\nlook", False),
        ("", "", False),
    ],
)
def test_compact(response: str, action: str, valid: bool) -> None:
    parsed = parse_action("compact", response, ADMISSIBLE, "admissible")
    assert (parsed.action, parsed.valid) == (action, valid)


def test_well_formed_asks_for_the_form_alone() -> None:
    response = "<think>x</think><action>fly away</action>"
    assert parse_action("think", response, ADMISSIBLE, "well_formed").valid
    assert not parse_action("think", "fly away", ADMISSIBLE, "well_formed").valid


def test_environment_without_admissible_actions_accepts_every_form() -> None:
    assert parse_action("compact", "anything", None, "admissible").valid


ODD = st.text() | st.lists(
    st.sampled_from(
        ["<action>x</action>", "<action>", "<", ">", "</think>", "<think>", "</x>", "\n", " ", '"', "a", "\0"]
    )
).map("".join)


@given(ODD)
@example('if a < b: print("</x>")')
@example('print("</action>")')
@example('{"a": "<action>"}\n')
@example("  leading\n\ttrailing \r\n")
@example("x" * 10_000)
def test_any_action_is_what_is_between_the_tags(action: str) -> None:
    parsed = parse_action("think", f"<think>hm</think>\n<action>{action}</action>", None, "admissible")
    assert parsed.action == action
    assert parsed.valid == bool(action.strip())


@given(ODD)
def test_any_action_is_the_whole_compact_response(action: str) -> None:
    parsed = parse_action("compact", f" {action}", None, "admissible")
    assert (parsed.action, parsed.valid) == (action, bool(action.strip()))


@pytest.mark.parametrize("template", ["think", "compact"])
def test_an_environment_may_list_odd_actions(template: str) -> None:
    for action in ("Go North", "\n", "", " x ", "a <b"):
        response = f" {action}" if template == "compact" else f"<think>t</think><action>{action}</action>"
        assert parse_action(template, response, [action], "admissible").valid  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("response", "form", "action", "valid"),
    [
        ("<think>x</think><action> Go to\n Desk 1 </action>", "lower_case", "go to desk 1", True),
        ("<think>x</think><action> Go to\n Desk 1 </action>", "one_line", "Go to Desk 1", False),
        ("<think>x</think><action>\tlook\n</action>", "one_line", "look", True),
        ("<think>x</think><action> </action>", "lower_case", "", False),
    ],
)
def test_forms_that_an_environment_may_want(response: str, form: str, action: str, valid: bool) -> None:
    parsed = parse_action("think", response, ADMISSIBLE, "admissible", form)  # type: ignore[arg-type]
    assert (parsed.action, parsed.valid) == (action, valid)


def test_a_compact_action_is_one_line_where_the_form_is() -> None:
    assert not parse_action("compact", "look\nlook", None, "admissible", "one_line").valid
    assert parse_action("compact", " go  to desk 1\n", ADMISSIBLE, "admissible", "one_line").valid
    assert shaped(" A\n b", "as_written") == " A\n b"


@pytest.mark.parametrize(
    ("action", "admissible"),
    [
        ("search[a red lamp]", True),
        ("search[]", False),
        ("search[", False),
        ("Search[lamp]", False),
        ("search[lamp] now", False),
        ("click[< prev]", True),
        ("click[anything]", False),
    ],
)
def test_admissible_action_with_open_text(action: str, admissible: bool) -> None:
    known = [f"search[{FREE_TEXT}]", "click[< prev]"]
    assert is_admissible(action, known) is admissible
    assert parse_action("compact", action, known, "admissible").valid is admissible
