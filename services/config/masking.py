"""Mask credentials in a configuration, and in any text that may contain a URL.

Report, API, dashboard, log lines and error messages all use the one function `masked`.

Invariants
- A URL keeps its scheme, host, port and path; user, password, query and fragment are removed. A URL whose parts are
  ambiguous is hidden entirely.
- Keys of episodes that agents play are hidden in any text.
- A value whose name ends in password, secret, token or key is hidden, whatever it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, overload
from urllib.parse import urlsplit

HIDDEN = "(hidden)"

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")
_EPISODE_KEY = re.compile(r"anc_[A-Za-z0-9_-]{43}")
_CLOSING = "'\")]}>,;:."
_SECRET_NAME = re.compile(r"(^|_)(password|passwd|secret|token|credentials|key)$", re.IGNORECASE)


@overload
def masked(value: str) -> str: ...
@overload
def masked(value: Mapping[str, Any]) -> dict[str, Any]: ...
@overload
def masked(value: object) -> Any: ...
def masked(value: object) -> Any:
    """Return a text with every URL in it masked, or a copy of a tree of plain data with every text masked.

    Example: `redis://:word@example:6379/0` becomes `redis://example:6379/0`.
    """
    match value:
        case str():
            if _ADDRESS.match(value) and "@" in value and any(map(str.isspace, value.strip())):
                return HIDDEN  # a password with a space in it would end the URL early
            return _EPISODE_KEY.sub(HIDDEN, _ADDRESS.sub(lambda found: _public(found[0]), value))
        case Mapping():
            return {name: HIDDEN if _is_secret(name, inner) else masked(inner) for name, inner in value.items()}
        case list() | tuple():
            return [masked(inner) for inner in value]
    return value


def _is_secret(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, str) and _SECRET_NAME.search(name) is not None


def _public(found: str) -> str:
    address = found.rstrip(_CLOSING)
    after = found[len(address) :]
    try:
        parts = urlsplit(address)
    except ValueError:
        return HIDDEN + after
    host = parts.netloc.rpartition("@")[2]
    # An unescaped / ? or # in a password ends the host early: the rest of the password would stay visible.
    if "@" in f"{parts.path}{parts.query}{parts.fragment}":
        return HIDDEN + after
    return f"{parts.scheme}://{host}{parts.path}{after}"
