"""The `alfworld` package, imported without its side effects.

Importing `alfworld` sets `ALFWORLD_DATA` where it is not set and makes the folder that it names. That variable decides
here where the games come from, so it is put back, and no folder is made.
"""

from __future__ import annotations

import functools
import importlib
import os
import tempfile
import threading
from types import ModuleType

_VARIABLE = "ALFWORLD_DATA"
_IMPORTING = threading.Lock()


@functools.cache
def alfworld_module(name: str) -> ModuleType:
    """The module `alfworld.<name>`; raises ImportError where the package or the module's own needs are missing."""
    with _IMPORTING:
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = tempfile.gettempdir()
        try:
            return importlib.import_module(f"alfworld.{name}")
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before
