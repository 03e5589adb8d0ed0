"""The workers' end of giving the KV cache's memory back on a CPU, where vLLM's own sleep mode does nothing.

vLLM adds the methods of `CacheMemory` to its workers (`worker_extension_cls`). On a GPU vLLM's allocator does the same
to the physical memory behind unchanged addresses.

Invariants
- Addresses stay valid: the kernel takes the pages away, and gives zeroed ones at the next access.
- Only pages that the cache fills alone are given back.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class CacheMemory:
    """Methods of a worker; `model_runner` is vLLM's."""

    model_runner: Any

    def give_cache_back(self) -> int:
        """Give the pages of the KV cache back to the kernel; what it holds is lost. Returns their bytes.

        Likewise what the allocator has kept of memory that is free.

        Raises:
            OSError: the kernel refuses.
        """
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(self.model_runner.kv_caches)}
        given = sum(_give_back(start, storage.nbytes()) for start, storage in storages.items())
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)
        return given


def _tensors(nested: Any) -> Iterator[torch.Tensor]:
    """Tensors of a layer's cache, which may be a list of several."""
    if isinstance(nested, list | tuple):
        for inner in nested:
            yield from _tensors(inner)
    else:
        yield nested


def _give_back(start: int, size: int) -> int:
    """Give back the whole pages between two addresses; their bytes.

    Example: pages of 4,096 bytes, 10,000 bytes from address 5,000: the page from 8,192 to 12,288.
    """
    page = mmap.PAGESIZE
    first, last = -(-start // page) * page, (start + size) // page * page
    if last <= first:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED) != 0:
        raise OSError(ctypes.get_errno(), "madvise failed")
    return last - first
