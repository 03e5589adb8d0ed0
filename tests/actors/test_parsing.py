from __future__ import annotations

import pytest

from actors.parsing import MAX_ACTION_CHARS, is_admissible, parse_action
from env_servers.protocol import FREE_TEXT

ADMISSIBLE = ["go to desk 1", "look"]


@pytest.mark.parametrize(
    ("response", "action", "valid"),
    [
        ("<think>hm</think><action>look</action>", "look", True),
        ("<think>a\nb</think>\n<action> Go to  Desk 1 </action>\n", "go to desk 1", True),
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
        (" go  to desk 1", "go to desk 1", True),
        ("look\nlook", "look look", False),
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


def test_action_length_is_bounded() -> None:
    assert len(parse_action("compact", "x" * 10_000, None, "admissible").action) == MAX_ACTION_CHARS


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
