"""A run that is at its end says so when it is resumed, and starts nothing; one with something left goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anchorage.cli.main import main
from anchorage.runs import training
from anchorage.runs.resume import finished
from learner.checkpoint import TrainerState, identity, save
from learner.record import SUCCESS
from services.config.load import dump_config, load_config
from services.config.tree import Config

DEMO = "configs/demo.yaml"


def ended(tmp_path: Path, *overrides: str, seconds: float = 1.0, version: int = 3) -> Config:
    """A run whose newest checkpoint is that of update `version`."""
    own = [f"run.dir={tmp_path}", "run.name=ended", "run.minutes=null", "evaluation.every=null"]
    config = load_config(Path(DEMO), [*own, *overrides])
    state = TrainerState(version, {"cursor": 3, "outstanding": []}, seconds, identity(config))
    save(
        config.run.folder / "checkpoints",
        state,
        engine=lambda folder: (folder / "part").write_text("x"),
        policy=lambda folder: folder.mkdir(),
        nbytes=0,
        keep=2,
        run=config.run.name,
        ranks=1,
    )
    (config.run.folder / "config.yaml").write_text(dump_config(config))
    return config


@pytest.mark.parametrize("choice", ["--resume=auto", "--resume"])
def test_a_finished_run_says_so_and_starts_nothing(
    tmp_path: Path, choice: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(training, "Stack")
    monkeypatch.delattr(training, "preflight")
    config = ended(tmp_path, "learner.updates=3")
    before = sorted(path.name for path in config.run.folder.iterdir())
    own = [f"run.dir={tmp_path}", "run.name=ended", "run.minutes=null", "evaluation.every=null"]
    main(["train", DEMO, *own, "learner.updates=3", choice])  # exits with another code by SystemExit
    [line] = capsys.readouterr().out.splitlines()
    assert line == (
        "run ended is finished: 3 of 3 updates are done (learner.updates); raise that to train on, or choose another "
        "run.name"
    )
    assert sorted(path.name for path in config.run.folder.iterdir()) == before


def test_one_that_has_used_its_minutes_is_finished(tmp_path: Path) -> None:
    config = ended(tmp_path, "learner.updates=9", "run.minutes=2", seconds=121.0)
    line = finished(config)
    assert line is not None
    assert "3 updates in 2.0 of 2 minutes are done (run.minutes)" in line


def test_one_with_something_left_to_do_is_not(tmp_path: Path) -> None:
    assert finished(ended(tmp_path / "updates", "learner.updates=4", "run.minutes=2", seconds=119.0)) is None
    panel = ended(tmp_path / "panel", "learner.updates=3", "evaluation.every=3")
    assert finished(panel) is None
    (panel.run.folder / "metrics.jsonl").write_text(json.dumps({"step": 3, SUCCESS: 0.5}) + "\n")
    assert finished(panel) is not None
    ended(tmp_path / "damaged", "learner.updates=3", version=2)
    damaged = ended(tmp_path / "damaged", "learner.updates=3")
    assert finished(damaged) is not None
    (damaged.run.folder / "checkpoints" / "000003" / "engine" / "part").write_text("y")
    assert finished(damaged) is None
