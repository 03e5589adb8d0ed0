"""Virtual environments of agent frameworks, each with the pins of a requirements file, made once and kept.

They lie in `.venv-agents/`, which git ignores, under a name with the digest of the file: changed pins make another one.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs
from tests.processes import ROOT

KEPT = ROOT / ".venv-agents"
INSTALL_S = 1200
_NOTHING_OFFERED = "(from versions: none)"
"""What pip says of a package that no index offers in any version: it reaches none."""


def interpreter(requirements: Path, *pip_arguments: str, kept: Path = KEPT) -> Path:
    """The interpreter of the environment with these requirements. Skips the test if pip reaches no package index.

    Args:
        requirements: a file of pins.
        pip_arguments: further ones.
        kept: the folder of the environments.
    """
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    folder = kept / f"{requirements.stem}-{version}-{digest}"
    kept.mkdir(exist_ok=True)
    with (kept / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of the suite may need it too
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _install(requirements, folder, pip_arguments)
            (folder / "complete").touch()
    return folder / "bin" / "python"


def _install(requirements: Path, folder: Path, pip_arguments: tuple[str, ...]) -> None:
    # The pip of this interpreter installs into the other environment: a pip of its own would take longer than the rest.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=INSTALL_S)
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", "--retries", "2"]
    command = [*pip, *pip_arguments, "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    if done.returncode and _NOTHING_OFFERED in done.stderr:
        pytest.skip(needs.AGENT_FRAMEWORKS)
    assert done.returncode == 0, done.stderr[-2000:]
