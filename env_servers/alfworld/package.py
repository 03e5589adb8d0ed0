"""The `alfworld` package: downloaded if it is missing, and imported without its side effects.

ALFWorld's rules (PDDL domain, grammar, goals, allowed placements) are data files of that package. The package depends
on TextWorld, which needs a C++ compiler to install and which the native engine does not use. It is therefore not a
dependency of this project. If it is missing, its wheel (0.4 MB) is downloaded once into the user's cache, without
dependencies and verified against its hash.

Importing `alfworld` sets `ALFWORLD_DATA` if it is unset and creates that folder. Here the variable selects the source
of the games, so it is restored after the import, and no folder is created.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import threading
from importlib import resources
from pathlib import Path
from types import ModuleType

from env_servers.environment import TaskError

logger = logging.getLogger(__name__)

RELEASE = "alfworld==0.4.2"
WHEEL_SHA256 = "29affbea28f6041d1e8516ed3efd6b55becd52cfca4fb9dd5c75b9d6b8a56c2f"
FETCH_TIMEOUT_S = 300.0

_VARIABLE = "ALFWORLD_DATA"
_IMPORTING = threading.Lock()


@functools.cache
def alfworld_module(name: str) -> ModuleType:
    """Return the module `alfworld.<name>`.

    Raises:
        TaskError: the package is missing and cannot be downloaded.
        ImportError: a dependency of the module, such as TextWorld, is not installed.
    """
    with _IMPORTING:
        if importlib.util.find_spec("alfworld") is None:
            sys.path.append(str(_fetched()))
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = tempfile.gettempdir()
        try:
            return importlib.import_module(f"alfworld.{name}")
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before


@functools.cache
def alfworld_text(name: str) -> str:
    """Return the text of a file in the package's `data` folder. Raises TaskError like `alfworld_module`."""
    alfworld_module("info")
    return (resources.files("alfworld") / "data" / name).read_text()


def _fetched() -> Path:
    """Return the folder that holds the package; pip downloads it on the first call. Raises TaskError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anchorage"
    folder = cache / RELEASE.replace("==", "-")
    if folder.is_dir():
        return folder
    logger.info("downloading %s (0.4 MB, once) into %s: the package holds ALFWorld's rules", RELEASE, folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as scratch:
            target = Path(scratch) / "package"
            _pip_install(target, Path(scratch) / "requirements.txt")
            with contextlib.suppress(OSError):
                target.rename(folder)  # fails if another process has renamed its copy first
    except OSError as error:
        raise TaskError(_advice(str(error))) from None
    if not folder.is_dir():
        raise TaskError(_advice(f"cannot write {folder}"))
    return folder


def _pip_install(target: Path, requirements: Path) -> None:
    requirements.write_text(f"{RELEASE} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--target", str(target), "-r", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise TaskError(_advice(f"pip took longer than {FETCH_TIMEOUT_S:g} s")) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
        raise TaskError(_advice(next((line for line in lines if line.startswith("ERROR")), lines[-1]).strip()))


def _advice(reason: str) -> str:
    return f"the alfworld package, which holds ALFWorld's rules, is missing ({reason}): pip install --no-deps {RELEASE}"
