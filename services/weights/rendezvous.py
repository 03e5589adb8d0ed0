"""The check-in before a collective transfer: no member sends or receives before all members are present.

A transfer that lacks a member hangs, and an interrupted one leaves a half-loaded model. A member that hangs or has died
is noticed here, by a timeout, before any weight is touched.
"""

from __future__ import annotations

from datetime import timedelta

CHECK_IN_SHARE = 0.25
"""Share of `weights.timeout_s` that members wait here for one another."""

_HERE, _GO = "here", "go"


def check_in(host: str, port: int, rank: int, world: int, timeout_s: float) -> None:
    """Return once all `world` ranks have called this; rank 0 hosts the store. Each rank is a thread or a process.

    Args:
        host: address of rank 0.
        port: port at which rank 0 listens meanwhile.
        rank: of the caller.
        world: number of ranks.
        timeout_s: how long to wait, in seconds.

    Raises:
        TimeoutError: a rank did not check in in time.

    Example:
        world 3: each rank sets here/RANK and waits for here/0, here/1 and here/2; then it sets go/RANK. Rank 0 returns
        last, after go/0, go/1 and go/2, because the store that the others read ends with it.
    """
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed import DistError

    limit = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(host, port, is_master=rank == 0, timeout=limit, wait_for_workers=False)
        store.set(f"{_HERE}/{rank}", "1")
        store.wait([f"{_HERE}/{other}" for other in range(world)], limit)
        # The store ends with rank 0, so that waits until every rank has seen that all are present.
        store.set(f"{_GO}/{rank}", "1")
        if rank == 0:
            store.wait([f"{_GO}/{other}" for other in range(world)], limit)
    except (DistError, RuntimeError) as error:
        raise TimeoutError(f"not all {world} ranks checked in within {timeout_s:g} s") from error
