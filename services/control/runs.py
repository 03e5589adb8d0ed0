"""The runs in a folder: each is a folder of its own with a `config.yaml`.

Invariants
- A run is found by the plain name of its folder; nothing outside the runs' folder can be named.
- A run whose configuration this version cannot read is still shown, from its files alone.
"""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from services.config import recipe_yaml
from services.config.masking import masked
from services.config.tree import Config
from services.control.group_index import GroupIndex
from services.control.json_lines import JsonLines
from services.control.live import Live, Snapshot
from services.control.views import CheckpointView, RunView
from services.run_folder import CHECKPOINTS_NAME, CONFIG_NAME, LEDGER_NAME, WARNINGS_NAME, redis_url
from services.telemetry import METRICS_NAME

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
ENDED = "ended"


class Run:
    """One run: its files, and its Redis if that responds. Thread-safe.

    Attributes:
        name: name of the run's folder.
        folder: the run's folder.
        tree: its configuration as it was written; empty if it cannot be read.
        config: its configuration; None if this version cannot read it.
        metrics, ledger, warnings: records of the run's files.
        groups: its archived groups.
        live: the connection to its Redis; None if the run cannot be live.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.folder = folder
        self.tree = _read_tree(folder / CONFIG_NAME)
        try:
            self.config: Config | None = Config.model_validate(self.tree)
        except ValidationError:
            self.config = None
        self.metrics = JsonLines(folder / METRICS_NAME)
        self.ledger = JsonLines(folder / LEDGER_NAME)
        self.warnings = JsonLines(folder / WARNINGS_NAME)
        self.groups = GroupIndex(folder)
        # The folder was renamed: its name in Redis may belong to another run.
        named = self.config is not None and self.config.run.name == folder.name
        self.live = Live(folder, self.config) if named and self.config is not None else None

    def snapshot(self) -> Snapshot | None:
        return self.live.snapshot() if self.live is not None else None

    def view(self) -> RunView:
        snapshot, records = self.snapshot(), self.metrics.records()
        return RunView(
            name=self.name,
            algorithm=_short(self.tree.get("algorithm")),
            env=_section(self.tree, "env").get("name"),
            live=snapshot is not None,
            state=snapshot.state if snapshot else ENDED,
            note=self._note(snapshot),
            update=max((int(r["step"]) for r in records if "rollout/success_rate" in r), default=0),
            updates=_section(self.tree, "learner").get("updates"),
            success=_last(records, "rollout/success_rate"),
            evaluation=_last(records, "evaluation/success_rate"),
            changed_at=_last(records, "time"),
        )

    def shown_config(self) -> dict[str, Any]:
        """The configuration to show, without credentials."""
        shown: dict[str, Any] = masked(json.loads(json.dumps(self.tree, default=str)))
        return shown

    def checkpoints(self) -> list[CheckpointView]:
        """Complete checkpoints, oldest first."""
        folder = self.folder / CHECKPOINTS_NAME
        found = sorted(p for p in folder.glob("[0-9]*") if p.name.isdecimal()) if folder.is_dir() else []
        return [view for path in found if (view := _checkpoint(path)) is not None]

    def close(self) -> None:
        if self.live is not None:
            self.live.close()

    def _note(self, snapshot: Snapshot | None) -> str:
        if snapshot is not None:
            return "live: its Redis responds"
        if self.live is not None and self.live.damage is not None:
            return f"not live: {self.live.damage}"
        if self.config is not None and redis_url(self.folder, self.config) is None:
            return "data from the run's folder; its Redis stopped with it"
        if self.config is None:
            return "this version cannot read the run's configuration; metrics and groups are from its folder"
        return "not live: its Redis does not respond; everything shown is from the run's folder"


def _short(algorithm: Any) -> str | None:
    """The configured algorithm without the folders of its file: `mine.py:mine`."""
    return algorithm.rpartition("/")[2] if isinstance(algorithm, str) else None


class Runs:
    """All runs below a folder. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._open: dict[str, tuple[tuple[int, int], Run]] = {}

    def all(self) -> list[Run]:
        """Every run, by name."""
        names = sorted(path.parent.name for path in self._folder.glob(f"*/{CONFIG_NAME}"))
        return [run for name in names if (run := self.find(name)) is not None]

    def find(self, name: str) -> Run | None:
        """The run of this name; reopened if another run has replaced it. None if there is none."""
        if not re.match(NAME_PATTERN, name):
            return None
        with self._lock:
            try:
                stat = (self._folder / name / CONFIG_NAME).stat()
            except OSError:
                self._forget(name)
                return None
            mark = (stat.st_ino, stat.st_mtime_ns)
            if name not in self._open or self._open[name][0] != mark:
                self._forget(name)
                self._open[name] = (mark, Run(self._folder / name))
            return self._open[name][1]

    def close(self) -> None:
        with self._lock:
            for name in list(self._open):
                self._forget(name)

    def _forget(self, name: str) -> None:
        found = self._open.pop(name, None)
        if found is not None:
            found[1].close()


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        tree = recipe_yaml.load(path.read_text())
    except (OSError, UnicodeDecodeError, recipe_yaml.RecipeError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    section = tree.get(name)
    return section if isinstance(section, dict) else {}


def _last(records: list[dict[str, Any]], name: str) -> float | None:
    return next((record[name] for record in reversed(records) if record.get(name) is not None), None)


def _checkpoint(path: Path) -> CheckpointView | None:
    """A checkpoint's summary; None if it is being removed or its state is damaged."""
    try:
        seconds = json.loads((path / "state.json").read_text())["seconds"]
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        written = (path / "state.json").stat().st_mtime
        seconds = float(seconds)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return CheckpointView(version=int(path.name), bytes=size, written_at=written, training_seconds=seconds)
