"""The episodes that a run was trained on, as a file for other programs: JSON lines or Parquet.

The format is described in docs/episodes-format.md. Both forms hold the same records.

Invariants
- A file is whole or not there. Episodes are written and read one after the other, however many there are.
- Token ids, log-probabilities and advantages are the very numbers that the learner trained with.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from services.archive import (
    ArchiveDamaged,
    GroupEntry,
    MemberEntry,
    StepNumbers,
    files,
    numbers_of,
    read_index,
    read_trajectory,
)
from services.errors import AnchorageError
from services.run_folder import run_config
from services.schemas import Step

SCHEMA = 1
"""Version of the format."""
BATCH = 64
"""Episodes of one row group of a Parquet file, which is the most that is held in memory."""

log = logging.getLogger(__name__)


class EpisodesUnavailable(AnchorageError):
    """Episodes cannot be written to a file, or read from it."""


def export_episodes(run: Path, file: Path) -> int:
    """Write every episode that is kept in the run's folder to `file` and return their number.

    The file's name ends in `.jsonl` or `.parquet`; an existing file is replaced. A damaged file of the archive, and one
    that the run removes meanwhile to make room, is left out with a warning in the log.

    Raises:
        NoSuchRun: the folder holds no run. ConfigError: its configuration is damaged.
        EpisodesUnavailable: no group is kept, the file cannot be written, or pyarrow is missing for Parquet.
    """
    name = run_config(run).run.name
    write = _writer(file)
    if not files(run):
        raise EpisodesUnavailable(f"{run} keeps no groups: it has not trained yet, or telemetry.keep_groups_mib is 0")
    count = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal count
        for record in records(run, name):
            count += 1
            yield record

    try:
        with _whole(file) as opened:
            write(counted(), opened)
    except OSError as error:
        raise EpisodesUnavailable(f"cannot write {file}: {error.strerror or error}") from None
    return count


def read_episodes(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the episodes of a file that `export_episodes` wrote, in their order.

    Raises:
        EpisodesUnavailable: the file is missing or invalid, or pyarrow is missing for Parquet. Raised while reading.
    """
    read = _read_parquet if _is_parquet(file) else _read_json_lines
    try:
        for record in read(file):
            if record.get("schema") != SCHEMA:
                raise EpisodesUnavailable(f"{file} has schema {record.get('schema')!r}; this version reads {SCHEMA}")
            yield record
    except OSError as error:
        raise EpisodesUnavailable(f"cannot read {file}: {error.strerror or error}") from None


def records(run: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield a record for each episode that is kept in the folder of the run called `name`, oldest update first."""
    for path in files(run):
        try:
            index = read_index(path)
            for group in index.groups:
                for member in group.members:
                    yield _record(name, index.update, path, group, member)
        except (ArchiveDamaged, FileNotFoundError) as error:
            log.warning("skipped the rest of %s: %s", path.name, error)


def _record(run: str, update: int, path: Path, group: GroupEntry, member: MemberEntry) -> dict[str, Any]:
    """Return the episode as plain data that JSON can hold."""
    episode, numbers = read_trajectory(path, member), numbers_of(member)
    ticket = episode.ticket
    return {
        "schema": SCHEMA,
        "run": run,
        "update": update,
        "group": group.group,
        "member": member.member,
        "group_size": ticket.group_size,
        "env": ticket.task.env,
        "split": ticket.task.split,
        "index": ticket.task.index,
        "task_type": group.task_type,
        "seed": ticket.seed,
        "temperature": ticket.temperature,
        "actor": episode.actor,
        "started_at": episode.started_at,
        "finished_at": episode.finished_at,
        "won": episode.won,
        "reward": _finite(episode.reward),
        "facts": _json_able(episode.facts),
        "steps": [_step(number, step, numbers) for number, step in enumerate(episode.steps)],
    }


def _step(number: int, step: Step, numbers: StepNumbers) -> dict[str, Any]:
    return {
        "number": number,
        "anchor": step.anchor,
        "step_group": int(numbers.step_group[number]),
        "observation": step.observation,
        "prompt": step.prompt,
        "response": step.response,
        "action": step.action,
        "prompt_ids": step.prompt_ids.tolist(),
        "response_ids": step.response_ids.tolist(),
        "logprobs": [_finite(value) for value in np.asarray(step.logprobs, np.float32).tolist()],
        "versions": [{"version": span.version, "tokens": span.tokens} for span in step.versions],
        "reward": _finite(step.reward),
        "valid": step.valid,
        "terminated": step.terminated,
        "truncated": step.truncated,
        "finished": step.finished,
        "prompt_truncated": step.prompt_truncated,
        "turn": int(numbers.turns[number]),
        "trained": step.trained,
        "extends": step.extends,
        "tool_calls": step.tool_calls,
        "return": _finite(numbers.returns[number]),
        "episode_advantage": _finite(numbers.episode[number]),
        "step_advantage": _finite(numbers.step[number]),
        "advantage": _finite(numbers.total[number]),
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinities."""
    return float(value) if math.isfinite(value) else None


def _json_able(facts: Mapping[str, object]) -> dict[str, Any]:
    """Return the facts as they come back from JSON."""
    plain: dict[str, Any] = orjson.loads(orjson.dumps(dict(facts), option=orjson.OPT_NON_STR_KEYS, default=str))
    return plain


@contextmanager
def _whole(file: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `file` when the block ends, on disk; after an error it leaves no trace."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _is_parquet(file: Path) -> bool:
    """Return the form of the file by its name. Raises EpisodesUnavailable for any other name."""
    if file.suffix not in (".jsonl", ".parquet"):
        raise EpisodesUnavailable(f"the file's name must end in .jsonl or .parquet, got {file.name}")
    return file.suffix == ".parquet"


def _writer(file: Path) -> Callable[[Iterable[dict[str, Any]], BinaryIO], None]:
    if not _is_parquet(file):
        return _write_json_lines
    _pyarrow()  # else the run would be read first
    return _write_parquet


def _write_json_lines(episodes: Iterable[dict[str, Any]], file: BinaryIO) -> None:
    for episode in episodes:
        file.write(orjson.dumps(episode, option=orjson.OPT_APPEND_NEWLINE))


def _read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = orjson.loads(line)
            except ValueError as error:
                raise EpisodesUnavailable(f"{file}, line {number}: invalid JSON: {error}") from None
            if not isinstance(record, dict):
                raise EpisodesUnavailable(f"{file}, line {number}: must be an object, got {type(record).__name__}")
            yield record


def _write_parquet(episodes: Iterable[dict[str, Any]], file: BinaryIO) -> None:
    pa, pq = _pyarrow()
    schema = _schema(pa)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        ahead = iter(episodes)
        while batch := list(islice(ahead, BATCH)):
            rows = [{**episode, "facts": json.dumps(episode["facts"])} for episode in batch]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    pa, pq = _pyarrow()
    try:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(BATCH):
                for row in batch.to_pylist():
                    yield {**row, "facts": json.loads(row["facts"])}
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise EpisodesUnavailable(f"{file} is not a file of episodes: {str(error).splitlines()[0]}") from None


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise EpisodesUnavailable(
            "Parquet needs pyarrow, which is not installed: pip install pyarrow, or use a file that ends in .jsonl"
        ) from None
    return pyarrow, pyarrow.parquet


def _schema(pa: Any) -> Any:
    """Return the columns of a Parquet file; `facts` is JSON text, since environments have facts of their own."""
    version = pa.struct([("version", pa.int32()), ("tokens", pa.int32())])
    texts = [(name, pa.string()) for name in ("observation", "prompt", "response", "action", "tool_calls")]
    ids = [(name, pa.list_(pa.int32())) for name in ("prompt_ids", "response_ids")]
    flags = [
        (name, pa.bool_()) for name in ("valid", "terminated", "truncated", "finished", "prompt_truncated", "trained")
    ]
    order = [(name, pa.int32()) for name in ("turn", "extends")]
    numbers = [(name, pa.float64()) for name in ("return", "episode_advantage", "step_advantage", "advantage")]
    step = pa.struct(
        [
            ("number", pa.int32()),
            ("anchor", pa.string()),
            ("step_group", pa.int64()),
            *texts,
            *ids,
            ("logprobs", pa.list_(pa.float32())),
            ("versions", pa.list_(version)),
            ("reward", pa.float64()),
            *flags,
            *order,
            *numbers,
        ]
    )
    whole = [(name, pa.int64()) for name in ("update", "group", "member", "group_size")]
    return pa.schema(
        [
            ("schema", pa.int32()),
            ("run", pa.string()),
            *whole,
            ("env", pa.string()),
            ("split", pa.string()),
            ("index", pa.int64()),
            ("task_type", pa.string()),
            ("seed", pa.int64()),
            ("temperature", pa.float64()),
            ("actor", pa.string()),
            *((name, pa.float64()) for name in ("started_at", "finished_at")),
            ("won", pa.bool_()),
            ("reward", pa.float64()),
            ("facts", pa.string()),
            ("steps", pa.list_(step)),
        ]
    )
