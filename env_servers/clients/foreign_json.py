"""JSON as servers of others write it, which Python's own `json` module lets through.

Invariants
- NaN, Infinity and numbers beyond a float are read: which value is wrong can then be said.
- Half a surrogate pair, which no text can hold, becomes U+FFFD.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

MOST_DIGITS = 400
"""An integer of more digits is read as infinite. Python refuses to read one of more than 4,300."""


def read_json(text: str | bytes) -> Any:
    """Parse a JSON text. Raises ValueError.

    Example: `read_json('["\\\\ud800", NaN]')` is `["\\ufffd", nan]`.
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
