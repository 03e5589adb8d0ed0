"""The `alfworld` package: fetched where it is missing, and imported without its side effects.

ALFWorld's rules (PDDL domain, grammar, goals, what fits where) are data of that package. It depends on TextWorld, whose
installation needs a C++ compiler and which the native engine does not need; so it is no dependency of ours. Where it is
missing, its wheel of 0.4 MB is fetched once, without dependencies and checked against its hash, into a cache of the
user's.

Importing `alfworld` sets `ALFWORLD_DATA` where it is not set and creates the folder that it names. That variable
decides here where the games come from, so it is restored, and no folder is created.
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
        TaskError: the package is missing and cannot be fetched.
        ImportError: the module needs what is not installed, such as TextWorld.
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
    """Return a text file of the package's `data` folder. Raises TaskError as `alfworld_module` does."""
    alfworld_module("info")
    return (resources.files("alfworld") / "data" / name).read_text()


def _fetched() -> Path:
    """Return the folder that holds the package, fetched by pip unless an earlier process did. Raises TaskError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anchorage"
    folder = cache / RELEASE.replace("==", "-")
    if folder.is_dir():
        return folder
    logger.info("fetching %s (0.4 MB) into %s, once: ALFWorld's rules are its data", RELEASE, folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as scratch:
            target = Path(scratch) / "package"
            _pip_install(target, Path(scratch) / "requirements.txt")
            with contextlib.suppress(OSError):
                target.rename(folder)  # another process may have been faster
    except OSError as error:
        raise TaskError(_advice(str(error))) from None
    if not folder.is_dir():
        raise TaskError(_advice(f"{folder} cannot be written"))
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
    return (
        f"ALFWorld's rules are data of the alfworld package, which is missing ({reason}): "
        f"pip install --no-deps {RELEASE}"
    )
