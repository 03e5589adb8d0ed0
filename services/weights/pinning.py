"""Host memory that CUDA copies to and from at full speed, while the processor does something else.

Only a GPU has a use for it: on a CPU nothing is pinned.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

from services.weights.payload import Payload

log = logging.getLogger(__name__)

_pinned: set[int] = set()


def pin(payload: Payload) -> None:
    """Pin the memory of a payload until it is freed. Does nothing without a GPU, or if it is pinned already."""
    import torch

    address = payload.ctypes.data
    if not torch.cuda.is_available() or address in _pinned:
        return
    failure = _cuda().cudaHostRegister(address, payload.nbytes, 0)
    if int(failure):
        # Such as RLIMIT_MEMLOCK in a container: copies are slower, and right all the same.
        log.warning("cannot pin %.0f MiB of weights (CUDA error %d)", payload.nbytes / 2**20, int(failure))
        return
    _pinned.add(address)
    weakref.finalize(payload, _unpin, address)


def _unpin(address: int) -> None:
    _pinned.discard(address)
    _cuda().cudaHostUnregister(address)


def _cuda() -> Any:
    """CUDA's runtime, as torch has it."""
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
