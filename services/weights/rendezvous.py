"""The check-in before a transfer: nobody sends or receives before everybody is there.

A collective transfer that lacks a member hangs, and one that is broken off leaves a half-loaded model. Who hangs or has
died is missed here, at a time limit, before any weight is touched.
"""

from __future__ import annotations

from datetime import timedelta

MEETING_SHARE = 0.25
"""Share of `weights.timeout_s` that members wait for one another."""

_HERE, _GO = "here", "go"


def meet(host: str, port: int, rank: int, world: int, timeout_s: float) -> None:
    """Return when all `world` ranks have come; rank 0 is the host. For ranks that are threads' or processes' own.

    Raises:
        TimeoutError: somebody did not come in time.
    """
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed import DistError

    limit = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(host, port, is_master=rank == 0, timeout=limit, wait_for_workers=False)
        store.set(f"{_HERE}/{rank}", "1")
        store.wait([f"{_HERE}/{other}" for other in range(world)], limit)
        # The host's store ends with it: it stays until everybody has seen that all are there.
        store.set(f"{_GO}/{rank}", "1")
        if rank == 0:
            store.wait([f"{_GO}/{other}" for other in range(world)], limit)
    except (DistError, RuntimeError) as error:
        raise TimeoutError(f"not all {world} ranks came together within {timeout_s:g} s") from error
