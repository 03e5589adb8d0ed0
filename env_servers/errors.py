"""Errors that end a server process, or its start: the message is one line, says what was wrong and what to do."""

from __future__ import annotations


class ServerError(Exception):
    """An environment server cannot start, or did not."""
