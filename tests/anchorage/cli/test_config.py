"""`anchorage config …` prints the effective tree, the schema and the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anchorage.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
DEMO = str(ROOT / "configs" / "demo.yaml")


def test_show_prints_values_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "show", DEMO, "algorithm=dapo", "learner.updates=7"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["updates:", "7", "#", "command", "line"] in lines
    assert ["clip_high:", "0.28", "#", "preset", "dapo"] in lines
    assert ["group_size:", "8", "#", DEMO] in lines
    assert ["ratio:", "token", "#", "default"] in lines


def test_show_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "show", DEMO, "learner.updates=7", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["learner.updates"] == {"value": 7, "source": "command line"}
    assert shown["optimizer.betas"] == {"value": [0.9, 0.999], "source": "default"}


def test_schema_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "schema"])
    assert json.loads(capsys.readouterr().out)["title"] == "Config"
    main(["config", "keys"])
    assert capsys.readouterr().out == (ROOT / "docs" / "configuration.md").read_text()


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["config", "show", DEMO, "learner.updatse=7"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "anchorage: learner.updatse: unknown key, did you mean learner.updates?\n"
