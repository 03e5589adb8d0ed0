"""Logs on the console, and metrics: as JSON lines in `metrics.jsonl` and for trackers (`services.tracking`).

Invariants
- `metrics.jsonl` is append-only, except that a resume drops the steps that the run will repeat: it has each step once.
- A partial last line, left by a killed process, never corrupts the next record.
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
    """The metrics cannot be written, for example for lack of space or permission."""


def open_metrics(
    folder: Path,
    config: TelemetryConfig,
    *,
    resume_step: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> MetricsWriter:
    """Return a writer with the configured trackers, which get the run's `settings`; see `RunInfo`.

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
    """Log to standard error, with rich on a terminal: our packages from `level` on, all others from WARNING on."""
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
    """Masks credentials in every line, whichever package logs it."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


class MetricsWriter:
    """Appends records to `metrics.jsonl` in a folder and passes each to `trackers`, which it closes at its end."""

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        """Open the file. With `resume_step`, drop the records of later steps, which the run repeats.

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
        """Write one record: `step`, `time` (Unix seconds) and the scalars. NaN and infinities become null in the file.

        Raises:
            MetricsUnwritable: the file cannot be written, for example for lack of space.
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
    """Rewrite the file atomically, without invalid lines and, on a resume, without later steps."""
    before = path.read_bytes()
    after = b"".join(line + b"\n" for line in before.splitlines() if _is_kept(line, resume_step))
    if after == before:
        return
    write_whole(path, after, durable=True)


def _is_kept(line: bytes, resume_step: int | None) -> bool:
    try:
        step = int(orjson.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        _log.warning("dropped an invalid line of %s: %.80r", METRICS_NAME, line)
        return False
    return resume_step is None or step <= resume_step
