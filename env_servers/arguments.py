"""Command-line arguments, and errors as one line on standard error with exit code 2.

Invariants
- Every error begins with `anchorage:`, as those of all other commands do.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that prints an error without the usage."""

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(f"{message}; see {self.prog} --help"))


def fail(message: object) -> int:
    """Write an error to standard error as one line; return the exit code of the command."""
    sys.stderr.write(f"anchorage: {message}\n")
    return 2


def positive(text: str) -> int:
    """Parse an integer >= 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {text}")
    return number


def seconds(text: str) -> float:
    """Parse a duration in seconds, > 0 and <= 3600."""
    number = float(text)
    if not 0 < number <= 3600:
        raise argparse.ArgumentTypeError(f"must be > 0 and <= 3600, got {text}")
    return number


def writable(text: str) -> Path:
    """Parse the path of a writable file. The check happens before any work and leaves no file behind."""
    file = Path(text)
    is_new = not file.exists()
    try:
        file.open("ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {file}: {error.strerror}") from None
    if is_new:
        file.unlink()
    return file
