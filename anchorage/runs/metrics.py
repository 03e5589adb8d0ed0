"""The figures of a run, read from its `metrics.jsonl`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.errors import AnchorageError
from services.telemetry import METRICS_NAME

PREFIX = "evaluation/"
FIGURES = ("success_rate", "success_low", "success_high", "mean_score", "mean_steps", "valid_fraction")
"""Of an evaluation, recorded as `evaluation/NAME`, and by split as `evaluation/SPLIT/NAME`."""

_log = logging.getLogger(__name__)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the run in `folder`, without invalid lines, which are counted in a warning.

    Raises:
        AnchorageError: the folder holds no metrics.
    """
    path = folder / METRICS_NAME
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        raise AnchorageError(f"{folder} holds no {METRICS_NAME}: name the folder of a run that has trained") from None
    records = [record for line in lines if (record := _record(line)) is not None]
    if len(records) < len(lines):
        _log.warning("%s: skipped %d invalid of %d lines", path, len(lines) - len(records), len(lines))
    return records


def evaluations(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each evaluation in the records, and one for each of its splits where it had several.

    Columns: `update`, `split` (None: over all splits), then `FIGURES`, None where a figure is missing. Rates are from 0
    to 1, `success_low` and `success_high` the ends of the 95 % interval.
    """
    for record in records:
        parts = [name.split("/") for name in record if name.startswith(PREFIX)]
        splits = dict.fromkeys(part[1] for part in parts if len(part) == 3)
        for split in (None, *splits):
            prefix = PREFIX if split is None else f"{PREFIX}{split}/"
            if record.get(f"{prefix}success_rate") is not None:
                figures = {name: record.get(f"{prefix}{name}") for name in FIGURES}
                yield {"update": record["step"], "split": split, **figures}


def _record(line: bytes) -> dict[str, Any] | None:
    """Return a record that has a whole number as its step and numbers otherwise; None for anything else."""
    try:
        record = json.loads(line)
        if not isinstance(record["step"], int):
            return None
        numbers = all(value is None or isinstance(value, int | float) for value in record.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if numbers else None
