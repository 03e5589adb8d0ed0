"""Virtual environments that hold a real OpenEnv each, since two of its releases cannot live in one.

They are made from `requirements/openenv-*.txt` on first use, and kept under `.pytest_cache` until that file changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CACHE = ROOT / ".pytest_cache" / "openenv"
INSTALL_LIMIT_S = 600


class NoOpenEnv(Exception):
    """The environment could not be made: pip reaches no index that has the packages."""


def python_with_openenv(release: str) -> Path:
    """The interpreter of an environment with OpenEnv `release`, "0.3" or "0.10". Raises NoOpenEnv."""
    requirements = ROOT / "requirements" / f"openenv-{release}.txt"
    key = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = CACHE / f"{release}-{key}"
    python = folder / "bin" / "python"
    if not python.exists():
        draft = CACHE / f"draft-{release}-{os.getpid()}"
        try:
            _make(draft, requirements)
            with suppress(OSError):  # another process was quicker
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return python


def _make(folder: Path, requirements: Path) -> None:
    venv.create(folder, with_pip=False)
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    command = [*install, "--disable-pip-version-check", "--retries", "1", "--no-deps", "-r", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise NoOpenEnv(f"pip did not install {requirements.name} within {INSTALL_LIMIT_S} s") from error
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NoOpenEnv(f"pip cannot install {requirements.name}: {errors[-1] if errors else done.stderr[-200:]}")
