"""A training from Python, off the main thread: it is stopped by a call-back, leaves a checkpoint, and is resumed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.tiers import long

SCRIPT = """
import signal
import threading
import time
import anchorage

config = anchorage.load_config(
    "configs/demo.yaml",
    {"run.dir": RUNS, "run.name": "small", "env.max_steps": 8, "checkpoint.every": 100},
    {"learner": {"updates": 6, "groups_per_update": 2, "group_size": 4}},
)
made = []
enough = threading.Event()

def note(progress):
    made.extend([progress.done] if progress.metrics else [])
    if len(made) == 2:
        enough.set()

def work(**options):
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(anchorage.train(config, **options)))
    thread.start()
    thread.join()
    return outcome[0]

before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
run = work(on_progress=note, should_stop=enough.is_set)
stopped_at = run.updates
assert 2 <= stopped_at < 6, stopped_at
assert [path.name for path in (run.folder / "checkpoints").iterdir()] == [f"{stopped_at:06d}"]
run = work(resume=True)
assert run.updates == 6
assert run.metrics().column("step") == [1, 2, 3, 4, 5, 6]
assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
"""


@long
@pytest.mark.timeout(1800)
def test_a_run_is_stopped_by_a_call_back_and_resumed(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("ALFWORLD_DATA", "REDIS_URL")}
    code = SCRIPT.replace("RUNS", repr(str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
