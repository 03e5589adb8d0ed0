"""What a run says of itself: its log on the console, its metrics as JSON lines, TensorBoard events, and for W&B.

Invariants
- `metrics.jsonl` is append-only but for a resume, which drops the steps that will be done again: each step is there
  once.
- A half-written last line (a killed process) never spoils the next record.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import orjson

from services.config.masking import masked
from services.config.tree import TelemetryConfig
from services.errors import AnchorageError
from services.wandb_run import WandbRun

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

OUR_PACKAGES = ("anchorage", "services", "env_servers", "actors", "learner")
METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"

_log = logging.getLogger(__name__)


class MetricsUnwritable(AnchorageError):
    """The metrics cannot be written: no space, no permission."""


def open_metrics(folder: Path, config: TelemetryConfig, *, resume_step: int | None = None) -> MetricsWriter:
    """The writer that the configuration asks for.

    Raises:
        MetricsUnwritable: the folder cannot be written.
        WandbUnavailable: `telemetry.wandb` asks for what there is not.
    """
    extra = None if config.wandb == "off" else WandbRun(folder, config.wandb_project, config.wandb)
    return MetricsWriter(folder, config.tensorboard, resume_step=resume_step, extra=extra)


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
    """Appends records to `metrics.jsonl` in a folder and, where asked, scalars to TensorBoard files below it.

    `extra` gets each record too, and is closed with the writer.
    """

    def __init__(
        self, folder: Path, tensorboard: bool, *, resume_step: int | None = None, extra: WandbRun | None = None
    ) -> None:
        """With `resume_step`, records of later steps are dropped: the run does them again.

        Raises:
            MetricsUnwritable: the folder cannot be written.
        """
        self._path = folder / METRICS_NAME
        self._extra = extra
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                _mend(self._path, resume_step)
            self._file = self._path.open("ab")
            self._events = _open_tensorboard(folder / TENSORBOARD_NAME, resume_step) if tensorboard else None
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
            if self._events is not None:
                for name, value in scalars.items():
                    self._events.add_scalar(name, float(value), step, walltime=now)
                self._events.flush()
            if self._extra is not None:
                self._extra.write(step, scalars)
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Close the files. May be called again."""
        try:
            self._file.close()
            if self._events is not None:
                self._events.close()
            if self._extra is not None:
                self._extra.close()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> MetricsUnwritable:
        return MetricsUnwritable(f"cannot write metrics to {self._path.parent}: {error.strerror}")


def _mend(path: Path, resume_step: int | None) -> None:
    """Rewrite the file, all or nothing, without broken lines and, on a resume, without the later steps."""
    before = path.read_bytes()
    after = b"".join(line + b"\n" for line in before.splitlines() if _is_kept(line, resume_step))
    if after == before:
        return
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(after)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _is_kept(line: bytes, resume_step: int | None) -> bool:
    try:
        step = int(orjson.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        _log.warning("dropping a broken line of %s: %.80r", METRICS_NAME, line)
        return False
    return resume_step is None or step <= resume_step


def _open_tensorboard(folder: Path, resume_step: int | None) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    purge_step = None if resume_step is None else resume_step + 1
    return SummaryWriter(log_dir=str(folder), purge_step=purge_step)
