"""What is wrong with the section `agent` is known before anything starts, one line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anchorage.checks.agent import TOKEN_VARIABLE, agent_problems, agent_token
from services.config.agent import AgentConfig
from tests.actors.gateway.families import TEMPLATES, tokenizer


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv(f"{TOKEN_VARIABLE}_FILE", raising=False)


def model(folder: Path, family: str, template: str | None = None) -> Path:
    """A folder with a tokenizer; nothing else of it is read here."""
    words = tokenizer(family)
    before = words.chat_template
    words.chat_template = template or before
    words.save_pretrained(folder)
    words.chat_template = before
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "model.safetensors").touch()
    return folder


def problems(agent: dict[str, Any], *models: Path) -> list[str]:
    return [*agent_problems(AgentConfig.model_validate(agent), models)]


def test_a_program_that_is_there_and_a_template_with_tools_pass(tmp_path: Path) -> None:
    script = tmp_path / "agent.py"
    script.touch()
    assert problems({"command": ["python", str(script)]}, model(tmp_path / "m", "chatml")) == []


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    assert problems({"command": ["python", str(tmp_path / "agent.py")]}) == [
        f"agent.command: no such file: {tmp_path}/agent.py; give a path that is relative to the recipe, or absolute"
    ]


def test_services_and_foreign_addresses_need_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (service,) = problems({"service": True})
    assert service.startswith(f"agent.service requires a token: set {TOKEN_VARIABLE}")
    (listens,) = problems({"command": ["sh"], "listen": "0.0.0.0:8100"})
    assert listens == f"agent.listen=0.0.0.0:8100 requires a token: set {TOKEN_VARIABLE}, or listen on 127.0.0.1"
    assert problems({"command": ["sh"], "listen": "[::1]:8100"}) == []
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    assert problems({"service": True}) == [f"{TOKEN_VARIABLE} must have at least 16 characters"]
    monkeypatch.delenv(TOKEN_VARIABLE)
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    monkeypatch.setenv(f"{TOKEN_VARIABLE}_FILE", str(file))
    assert problems({"service": True}) == []
    assert agent_token() == "0123456789abcdef"


def test_a_template_that_drops_thoughts_asks_for_a_choice(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "thinking", TEMPLATES["thinking"][0])
    (line,) = problems({"command": ["sh"]}, folder)
    assert "drops the thoughts of earlier turns: agent.history=sampled" in line
    assert "agent.history=template" in line
    assert problems({"command": ["sh"], "history": "sampled"}, folder) == []
    assert problems({"command": ["sh"], "history": "template"}, folder) == []


def test_a_template_without_tools_is_for_agents_that_declare_none(tmp_path: Path) -> None:
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    plain += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    folder = model(tmp_path / "m", "chatml", plain)
    (line,) = problems({"command": ["sh"]}, folder)
    assert "takes no tools" in line
    assert problems({"command": ["sh"], "reader": "text"}, folder) == []


def test_a_reader_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (line,) = problems({"command": ["sh"], "reader": "no_such_module:Reader"}, model(tmp_path / "m", "chatml"))
    assert "agent.reader" in line
    assert "no_such_module" in line
