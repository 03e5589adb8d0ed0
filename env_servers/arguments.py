"""Command-line arguments. Errors are one line on standard error, with exit code 2."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that prints an error without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


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
