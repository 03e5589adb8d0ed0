"""A group of checks that go wrong in every way that a group's process must survive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_check.rows import Row, measured
from benchmarks.gpu_check.settings import Settings


def raises(settings: Settings) -> Iterator[Row]:
    yield measured("before the error", 1)
    raise ValueError("a first line\nand another")


def ends(settings: Settings) -> Iterator[Row]:
    """Ends, or hangs, as the file `how` says; the file `child` gets the id of a process that it leaves behind."""
    yield measured("after the error", 2)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (settings.folder / "child").write_text(str(child.pid))
    print("the last line")
    sys.stdout.flush()
    how = Path(settings.folder, "how").read_text()
    if how == "hang":
        signal.pause()
    os.kill(os.getpid(), getattr(signal, how))


CHECKS = (raises, ends)
