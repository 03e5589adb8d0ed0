"""Make a virtual environment from the locks, step by step, and show how far it is: `make setup`, `make tools`.

Each lock is installed with its hashes and without dependencies. torch comes after it and with its dependencies: those
of a CPU build and, after gpu.txt, those of PyPI's CUDA build are installed by then; another build brings its own.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
OLDEST, NEWEST = (3, 11), (3, 13)
EVERY_S = 10.0
MIB = 1024.0
_UNITS = {"kB": 1 / MIB, "MB": 1.0, "GB": MIB}
_SIZE = re.compile(r"\(([\d.]+) (kB|MB|GB)\)")
Step = tuple[str, list[str]]


def main() -> int:
    given = _arguments()
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        return _fail(
            f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}: make PYTHON=/path/to/python3.12"
        )
    if sys.version_info[:2] > (3, 12) and {"cpu", "gpu"} & set(given.locks):
        print("note: with Python 3.13 only environments, servers and the API are tested (make setup-env)", flush=True)
    steps = _steps(given.venv, given.locks, given.pip)
    began = time.monotonic()
    for number, (title, command) in enumerate(steps, start=1):
        print(f"[{number}/{len(steps)}] {title}", flush=True)
        if code := _follow(command):
            return code
    print(f"done in {time.monotonic() - began:.0f} s", flush=True)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Install the locks into a virtual environment.")
    parser.add_argument("venv", type=Path, help="the virtual environment; made where it is missing")
    parser.add_argument("locks", nargs="+", help="names of locks: cpu, gpu, base, dev, textworld …")
    parser.add_argument("--pip", default="", help="further arguments of pip, in one string")
    return parser.parse_args()


def _steps(venv: Path, locks: Sequence[str], pip_arguments: str) -> list[Step]:
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--progress-bar", "off", "--no-compile"]
    more = pip_arguments.split()
    steps: list[Step] = []
    if not (venv / "bin" / "python").exists():
        title = f"virtual environment {venv} with Python {sys.version.split()[0]}"
        steps.append((title, [sys.executable, "-m", "venv", str(venv)]))
    for lock in locks:
        if lock == "textworld" and not _has_compiler():
            print("no C++ compiler (apt-get install g++): TextWorld is not built, its engine and its tests are skipped")
            continue
        file = HERE / f"{lock}.txt"
        count = len(re.findall(r"^[A-Za-z0-9]", file.read_text(), re.MULTILINE))
        steps.append((f"{count} packages of requirements/{file.name}", [*pip, *more, "--no-deps", "-r", str(file)]))
        if lock in ("cpu", "gpu"):
            steps.append(("torch, with the libraries of its build", [*pip, *more, "-r", str(HERE / "torch.txt")]))
        if lock in ("cpu", "gpu", "base"):
            # The two larger locks have setuptools; without it pip fetches what the build needs.
            isolation = [] if lock == "base" else ["--no-build-isolation"]
            own = [*pip, *more, "--no-deps", *isolation, "--editable", str(HERE.parent)]
            steps.append(("anchorage-rl itself", own))
    return steps


def _has_compiler() -> bool:
    return any(map(shutil.which, ("g++", "c++", "clang++"))) and any(map(shutil.which, ("gcc", "cc", "clang")))


def _follow(command: Sequence[str]) -> int:
    """Run pip; tell every few seconds what it has done so far. Its output is shown where it fails."""
    began = told = time.monotonic()
    found, mib, lines = 0, 0.0, []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            found += line.startswith(("Collecting ", "Processing "))
            if line.lstrip().startswith(("Downloading ", "Using cached ")) and (size := _SIZE.search(line)):
                mib += float(size[1]) * _UNITS[size[2]]
            now, installing = time.monotonic(), line.startswith("Installing collected packages")
            if now - told >= EVERY_S or installing:
                told = now
                what = ": installing them" if installing else ""
                print(f"    {found} packages, {mib:.0f} MB, {now - began:.0f} s{what}", flush=True)
    if process.returncode:
        sys.stderr.writelines(lines[-30:])
        return _fail(f"{' '.join(command[:5])} … ended with code {process.returncode}")
    print(f"    {found} packages, {mib:.0f} MB, {time.monotonic() - began:.0f} s", flush=True)
    return 0


def _fail(message: str) -> int:
    print(f"setup: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
