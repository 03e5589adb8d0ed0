"""`anchorage status` of a live run whose actors play by agent programs."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from anchorage.cli.status import print_status
from tests.control_runs import make_finished, make_live


def said(folder: Path, *, as_json: bool = False) -> str:
    out = io.StringIO()
    print_status(folder, as_json=as_json, console=Console(file=out, width=400))
    return out.getvalue()


def test_agents_and_the_chat_template_are_told(tmp_path: Path, redis_url: str) -> None:
    config, buffer = make_live(tmp_path, "spied", redis_url)
    try:
        text = said(config.run.folder)
        facts = json.loads(said(config.run.folder, as_json=True))
    finally:
        buffer.close()
    assert "agents: 3 playing in 4 processes, 12.5 calls/s, 1.5 calls a turn, prompts continued 99.5 %" in text
    assert "short anchors –; http://127.0.0.1:8100" in text
    assert "tools: yes; <img" in text
    assert facts["actors"]["actors"][0]["agents"]["extended_fraction"] == 0.995


def test_a_run_that_has_ended_has_no_agents(tmp_path: Path) -> None:
    text = said(make_finished(tmp_path).run.folder)
    assert "agents" not in text
    assert "chat template" not in text
