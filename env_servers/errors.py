"""The error that ends a server or its start, and error messages as one line.

Invariants
- Every message that leaves a process is one line: it says what is wrong, with the value, and what to do.
"""

from __future__ import annotations

from pydantic import ValidationError

SHOWN_ERRORS = 5
SHOWN_CHARS = 300


class ServerError(Exception):
    """An environment server could not start or had to stop. The message is one line for the user."""


def summary(error: ValidationError) -> str:
    """A validation error as one line: which field and what is wrong, without the input.

    At most `SHOWN_ERRORS` fields are listed.
    """
    found = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"]))) for e in found[:SHOWN_ERRORS]]
    more = [f"{len(found) - SHOWN_ERRORS} more"] if len(found) > SHOWN_ERRORS else []
    return "; ".join(shown + more)


def one_line(text: object) -> str:
    """A message from elsewhere as one line, cut to `SHOWN_CHARS` characters.

    White space is collapsed, and characters that a terminal would obey, such as escape sequences, become spaces.
    """
    shown = str(text)[:SHOWN_CHARS]
    return " ".join("".join(char if char.isprintable() else " " for char in shown).split())
