"""JSON as foreign servers write it: what Python's own `json` module accepts, and valid text out of it.

Invariants
- NaN, Infinity and numbers beyond a float are read, so that the error can name the value.
- A lone surrogate, which no Python text can be encoded with, becomes U+FFFD.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

MOST_DIGITS = 400
"""A longer integer is read as infinite. Python refuses to read one of more than 4,300 digits."""


def read_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: it is no JSON, is no UTF-8, or is nested too deeply.

    Example:
        >>> read_json('["\\\\ud800", NaN]')
        ['\\ufffd', nan]
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        whole = json.dumps(json.loads(text, parse_int=_integer), ensure_ascii=False)
        return json.loads(whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MOST_DIGITS else float(digits)
