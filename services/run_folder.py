"""The files of a run's folder that more than one part knows, and how to find the run's Redis from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from services.config.tree import Config
from services.redis_server import ADDRESS_NAME

CONFIG_NAME = "config.yaml"
CHECKPOINTS_NAME = "checkpoints"
LEDGER_NAME = "ledger.jsonl"
SUMMARY_NAME = "summary.json"
REDIS_NAME = "redis"
AUDIT_NAME = "audit.jsonl"
WARMSTART_NAME = "warmstart.json"
"""In the folder of a model that `anchorage warmstart` made: how, its configuration included."""


def run_of(policy: Path) -> Path | None:
    """The folder of the run whose checkpoint a policy is in."""
    runs = [above.parent for above in policy.absolute().parents if above.name == CHECKPOINTS_NAME]
    return next((run for run in runs if (run / CONFIG_NAME).is_file()), None)


def redis_url(folder: Path, config: Config, environment: Mapping[str, str] = os.environ) -> str | None:
    """Address of the Redis that the run uses, or used; None: one of its own, which is gone."""
    if config.buffer.redis_url:
        return config.buffer.redis_url
    try:
        return (folder / REDIS_NAME / ADDRESS_NAME).read_text().strip() or None
    except OSError:
        return environment.get("REDIS_URL")
