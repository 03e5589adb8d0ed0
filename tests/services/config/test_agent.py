"""The section `agent`: what it refuses, and paths that are relative to a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from services.config.load import ConfigError, dump_config, load_config, parse_config


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        ({}, "agent: give exactly one of command and service"),
        ({"command": ["python", "a.py"], "service": True}, "agent: give exactly one of command and service"),
        ({"service": True, "preload": ["openai"]}, "agent: preload requires command"),
        ({"service": True, "reader": "json"}, "agent.reader: must be one of auto, hermes, xml, llama3, text"),
        ({"service": True, "listen": "8100"}, "agent.listen: must be host:port"),
        ({"service": True, "listen": "127.0.0.1:99999"}, "agent.listen: must be host:port"),
        ({"service": True, "advertise": "10.0.0.7"}, "agent.advertise"),
        ({"service": True, "history": "all"}, "agent.history: must be one of sampled, template"),
        ({"service": True, "pass_environment": ["REDIS_URL"]}, "agent.pass_environment.0: REDIS_URL is set by"),
        ({"service": True, "pass_environment": ["A-B"]}, "must be the name of an environment variable"),
        ({"service": True, "max_calls": 0}, "agent.max_calls: must be >= 1"),
        ({"service": True, "max_call": 5}, "agent.max_call: unknown key, did you mean"),
    ],
)
def test_mistakes_are_one_line_each(agent: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config({"agent": agent})
    (line,) = str(error.value).splitlines()
    assert said in line


def test_scripts_are_relative_to_the_recipe_and_survive_a_dump(tmp_path: Path) -> None:
    (tmp_path / "tools.json").touch()
    recipe = tmp_path / "agents.yaml"
    recipe.write_text("agent: {command: [python, agent.py, ./tools.json, --model, openai/gpt, sub/missing.txt]}")
    config = load_config(recipe)
    assert config.agent is not None
    expected = ("python", str(tmp_path / "agent.py"), str(tmp_path / "tools.json"), "--model", "openai/gpt")
    assert config.agent.command == (*expected, "sub/missing.txt")
    assert parse_config(dump_config(config)) == config


def test_the_interpreter_of_a_virtual_environment_is_named_as_it_is(tmp_path: Path) -> None:
    """It is a link. What it leads to is an interpreter without the environment's packages."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    recipe = tmp_path / "recipes" / "agents.yaml"
    recipe.parent.mkdir()
    recipe.write_text("agent: {command: [../venv/bin/python, agent.py]}")
    config = load_config(recipe)
    assert config.agent is not None
    assert config.agent.command == (str(python), str(recipe.parent / "agent.py"))


def test_a_run_has_no_agent_by_default() -> None:
    assert load_config(None).agent is None
