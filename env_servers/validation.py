"""Validation errors as one line."""

from __future__ import annotations

from pydantic import ValidationError

SHOWN_ERRORS = 5


def summary(error: ValidationError) -> str:
    """A validation error as one line: where and what, without the input."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"]))) for e in found[:SHOWN_ERRORS]]
    more = [f"{len(found) - SHOWN_ERRORS} more"] if len(found) > SHOWN_ERRORS else []
    return "; ".join(shown + more)
