"""The files of a run's folder that more than one part knows, and how to find the run's Redis from it.

Invariants
- The address of a Redis of the run's own holds its password: the file is its owner's alone (0600), and goes when the
  Redis does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from services.config.tree import Config

CONFIG_NAME = "config.yaml"
CHECKPOINTS_NAME = "checkpoints"
LEDGER_NAME = "ledger.jsonl"
SUMMARY_NAME = "summary.json"
ENVIRONMENT_URL_NAME = "environment.url"
REDIS_URL_NAME = "redis.url"
AUDIT_NAME = "audit.jsonl"


@contextmanager
def connection_file(folder: Path, url: str) -> Iterator[None]:
    """Leave the address of the run's own Redis in its folder, for the control plane, for as long as this lasts."""
    path = folder / REDIS_URL_NAME
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(url)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def redis_url(folder: Path, config: Config, environment: Mapping[str, str] = os.environ) -> str | None:
    """Address of the Redis that the run uses, or used; None: one of its own, which is gone."""
    try:
        return (folder / REDIS_URL_NAME).read_text().strip() or None
    except OSError:
        return config.buffer.redis_url or environment.get("REDIS_URL")
