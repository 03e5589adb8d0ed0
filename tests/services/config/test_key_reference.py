"""The reference of the keys is complete, and the page of the documentation is the one that the command prints."""

from __future__ import annotations

import re
from pathlib import Path

from services.config import key_reference
from services.config.provenance import settings

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_is_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == key_reference.page(), "run: anchorage config keys > docs/configuration.md"


def test_every_key_is_described_with_its_type_and_default() -> None:
    page = key_reference.page()
    described = set(re.findall(r"^- `([^`]+)`:", page, re.MULTILINE))
    assert {setting.key for setting in settings(None)} <= described
    assert "- `learner.group_size`: whole number >= 2; default `8`." in page
    assert "- `run.seed`: whole number >= 0 and <= 2,147,483,647; default `0`." in page
    assert "- `rollout.partial_groups`: `replace` | `keep`; default `replace`." in page
    assert "- `run.minutes`: number > 0 or null; default `null`." in page
    assert "Each has the keys of `env`." in page
    assert max(map(len, page.splitlines())) <= 120


def test_the_schema_names_required_types_and_meanings() -> None:
    schema = key_reference.schema()
    learner = schema["$defs"]["LearnerConfig"]["properties"]
    assert learner["group_size"] | {"description": ""} == {
        "default": 8,
        "description": "",
        "minimum": 2,
        "title": "Group Size",
        "type": "integer",
    }
    assert schema["additionalProperties"] is False
