"""`python -m benchmarks.gpu_check [--dry] [--json FILE] [--only GROUP …] [--model MODEL]`; see docs/gpu-check.md.

The exit code is 0 if nothing failed, 1 if something did, and 2 for invalid arguments.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from anchorage.cli.output import literal_console, require_writable, write_text
from benchmarks.gpu_check.child import run_apart
from benchmarks.gpu_check.groups import GROUPS
from benchmarks.gpu_check.models import SIZES, own_folder
from benchmarks.gpu_check.report import document, facts, show, shown
from benchmarks.gpu_check.rows import Row
from benchmarks.gpu_check.settings import Settings
from services.errors import AnchorageError
from services.folders import folder_problem

OUTPUT = "-"
"""Value of `--json` for standard output."""
WIDTH = 160
"""Of a table that does not go to a terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the groups, print the table, write the file; return the exit code."""
    given = _arguments(arguments)
    to_output = given.json == OUTPUT
    file = Path(given.json) if given.json and not to_output else None
    terminal = sys.stderr if to_output else sys.stdout
    console = literal_console(terminal, None if terminal.isatty() else WIDTH)
    try:
        require_writable(file)
        own_folder(given.model)
        if given.logs is not None and (problem := folder_problem(given.logs)) is not None:
            raise AnchorageError(f"--logs={given.logs}: cannot write: {problem}")
        rows, seconds = _check(given, console)
        text = document(facts(given.dry), rows, seconds)
        show(rows, console)
        if file is not None:
            write_text(file, text)
        elif to_output:
            print(text, end="")
    except AnchorageError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    failures = sum(row.verdict == "failed" for _, row in rows)
    console.print(_summary(rows, seconds))
    return 1 if failures else 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-check", description="Check a machine with GPUs.")
    parser.add_argument("--dry", action="store_true", help="small sizes on the CPU, to exercise the checks themselves")
    parser.add_argument("--json", metavar="FILE", help="write every figure to FILE; -: to standard output")
    parser.add_argument(
        "--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS)
    )
    parser.add_argument(
        "--model", metavar="MODEL", help=f"folder of a model, or a random one of a size: {', '.join(SIZES)} (0.5b)"
    )
    parser.add_argument("--folder", type=Path, help="for temporary files, some 20 GB (the system's by default)")
    parser.add_argument("--logs", type=Path, help="keep what the groups print in this folder")
    given = parser.parse_args(arguments)
    given.model = given.model or ("tiny-64" if given.dry else "0.5b")
    return given


def _check(given: argparse.Namespace, console: Console) -> tuple[list[tuple[str, Row]], dict[str, float]]:
    """Run the groups in their order; return the rows with their groups, and the seconds of each group."""
    rows: list[tuple[str, Row]] = []
    seconds: dict[str, float] = {}
    with _temporary(given.folder) as folder:
        settings = Settings(given.dry, given.model, Path(folder))
        for name in (name for name in GROUPS if name in given.only):
            console.print(f"{name}: {GROUPS[name].title}")

            def report(row: Row, name: str = name) -> None:
                rows.append((name, row))
                console.print(f"    {row.verdict:<8}  {row.name}: {shown(row.value)}", soft_wrap=True)

            log, began = settings.folder / f"{name}.log", time.monotonic()
            run_apart(GROUPS[name], settings, log, report)
            seconds[name] = time.monotonic() - began
            if given.logs is not None:
                _keep(log, given.logs)
    return rows, seconds


def _temporary(parent: Path | None) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="gpu-check-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise AnchorageError(f"--folder={parent}: cannot write: {error.strerror}") from None


def _keep(log: Path, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, folder)
    except OSError as error:
        raise AnchorageError(f"--logs={folder}: cannot write: {error.strerror}") from None


def _summary(rows: Sequence[tuple[str, Row]], seconds: dict[str, float]) -> str:
    counted = {verdict: sum(row.verdict == verdict for _, row in rows) for verdict in ("ok", "failed", "skipped")}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counted.items())
    return f"{told}, {sum(seconds.values()):.0f} s"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
