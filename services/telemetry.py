"""What a run says of itself: its log on the console, its metrics as JSON lines and for trackers (`services.tracking`).

Invariants
- `metrics.jsonl` is append-only but for a resume, which drops the steps that will be done again: each step is there
  once.
- A half-written last line (a killed process) never spoils the next record.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from services.config.masking import masked
from services.config.tree import TelemetryConfig
from services.errors import AnchorageError
from services.files import write_whole
from services.tracking import RunInfo, load_trackers
from services.tracking.background import BackgroundTracker

OUR_PACKAGES = ("anchorage", "services", "env_servers", "actors", "learner")
METRICS_NAME = "metrics.jsonl"

_log = logging.getLogger(__name__)


class MetricsUnwritable(AnchorageError):
    """The metrics cannot be written: no space, no permission."""


def open_metrics(
    folder: Path,
    config: TelemetryConfig,
    *,
    resume_step: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> MetricsWriter:
    """The writer that the configuration asks for. `settings`: of the run, for its trackers, see `RunInfo`.

    Raises:
        MetricsUnwritable: the folder cannot be written.
        PluginError, TrackerUnavailable: a tracker cannot be loaded.
    """
    makers = load_trackers(config)
    writer = MetricsWriter(folder, resume_step=resume_step)
    run = RunInfo(folder, resume_step, settings or {})
    writer.trackers = [BackgroundTracker(name, make, run) for name, make in makers.items()]
    return writer


def setup_logging(level: str) -> None:
    """Log to standard error, through rich on a terminal: our packages from `level` on, of everybody else warnings."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False)
        handler.setFormatter(_Masked("%(message)s", datefmt="%H:%M:%S"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Masked("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in OUR_PACKAGES:
        logging.getLogger(package).setLevel(level)


class _Masked(logging.Formatter):
    """Lines without credentials, whoever wrote them."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


class MetricsWriter:
    """Appends records to `metrics.jsonl` in a folder, and hands each to `trackers`, which are closed with it."""

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        """With `resume_step`, records of later steps are dropped: the run does them again.

        Raises:
            MetricsUnwritable: the folder cannot be written.
        """
        self._path = folder / METRICS_NAME
        self.trackers: list[BackgroundTracker] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                _mend(self._path, resume_step)
            self._file = self._path.open("ab")
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One record: `step`, `time` (Unix seconds) and the scalars; NaN and infinities become null in the JSON line.

        Raises:
            MetricsUnwritable: no space left, or the like.
        """
        now = time.time()
        record = {"step": step, "time": now, **{name: float(value) for name, value in scalars.items()}}
        try:
            self._file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None
        for tracker in self.trackers:
            tracker.write(step, scalars)

    def close(self) -> None:
        """Close the file and the trackers. May be called again."""
        try:
            self._file.close()
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            for tracker in self.trackers:
                tracker.close()

    def _unwritable(self, error: OSError) -> MetricsUnwritable:
        return MetricsUnwritable(f"cannot write metrics to {self._path.parent}: {error.strerror}")


def _mend(path: Path, resume_step: int | None) -> None:
    """Rewrite the file, all or nothing, without broken lines and, on a resume, without the later steps."""
    before = path.read_bytes()
    after = b"".join(line + b"\n" for line in before.splitlines() if _is_kept(line, resume_step))
    if after == before:
        return
    write_whole(path, after, durable=True)


def _is_kept(line: bytes, resume_step: int | None) -> bool:
    try:
        step = int(orjson.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        _log.warning("dropping a broken line of %s: %.80r", METRICS_NAME, line)
        return False
    return resume_step is None or step <= resume_step
