"""The shop's settings: read from variables, and the same in the documentation and the compose file."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from env_servers.environment import BrokenTask
from env_servers.webshop.settings import PREFIX, WebShopSettings, read_settings
from tests.processes import ROOT

FIELDS = WebShopSettings.model_fields


def test_the_documentation_lists_every_setting_with_its_default_and_meaning() -> None:
    text = (ROOT / "docs" / "environments.md").read_text()
    rows = re.findall(rf"^\| `{PREFIX}(\w+)` \| (.+?) \| (.+) \|$", text, re.MULTILINE)
    shown: dict[str, Any] = {
        name.upper(): ("unset" if field.default is None else f"`{field.default}`", field.description)
        for name, field in FIELDS.items()
    }
    assert {name: (default, meaning) for name, default, meaning in rows} == shown


def test_the_compose_file_passes_every_setting_on() -> None:
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["webshop"]
    passed = [f"{PREFIX}{name.upper()}" for name in FIELDS if name != "data"]
    assert service["environment"] == {name: f"${{{name}:-}}" for name in passed}


def test_empty_variables_are_none() -> None:
    assert read_settings({f"{PREFIX}{name.upper()}": "" for name in FIELDS}) == WebShopSettings()
    assert read_settings({"WEBSHOP_PRODUCTS": "7", "WEBSHOP_ATTRIBUTES": "true"}).products == 7


def test_an_impossible_variable_is_one_line() -> None:
    with pytest.raises(BrokenTask, match="invalid WEBSHOP_… variable: products: ") as caught:
        read_settings({"WEBSHOP_PRODUCTS": "0"})
    assert "\n" not in str(caught.value)
