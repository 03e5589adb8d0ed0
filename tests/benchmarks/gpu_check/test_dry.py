"""`gpu-check --dry`: groups run on the CPU, and nothing fails.

Left out is what takes long and is tested elsewhere: `anchorage.train` in tests/integration, two workers in
tests/actors/engine, two ranks and resuming in tests/learner/rank, channels in tests/services/weights, the kernels
beside this file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.tiers import long

GROUPS_HERE = ("machine", "zero-2", "engine", "algorithms")


@long
@pytest.mark.timeout(1200)
def test_groups_run_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry", "--json", str(file), "--only", *GROUPS_HERE]
    done = subprocess.run([*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    found = json.loads(file.read_text())
    rows = {(row["group"], row["name"]): row for row in found["rows"]}
    assert [row for row in rows.values() if row["verdict"] == "failed"] == []
    assert done.returncode == 0, done.stdout[-2000:]
    assert {group for group, _ in rows} == set(GROUPS_HERE)
    # What a CPU can do was done, and not skipped.
    for name in (
        ("machine", "cards, counts agree"),
        ("zero-2", "gradient against float32, 1 − cosine"),
        ("engine", "gap of changed weights, mean, nats"),
        ("engine", "attention back end"),
        ("engine", "gap to the learner, k3, nats"),
        ("algorithms", "host memory of preparing, GiGPO over GRPO"),
    ):
        assert rows[name]["verdict"] == "ok", name
    assert all(row["reason"] for row in rows.values() if row["verdict"] == "skipped")
    assert str(tmp_path) not in file.read_text()
