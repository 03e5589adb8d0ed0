"""Both ends of a collective transfer over gloo, in host memory: for engines on CPUs.

Invariants
- Both ends cut the tensors into the same buckets, one broadcast each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from services.weights.collective import Sender
from services.weights.payload import in_buckets
from services.weights.rounds import Group, Membership

if TYPE_CHECKING:
    import torch

BUCKET_BYTES = 64 * 2**20


class GlooSender(Sender):
    """Rank 0 of a group."""

    def __init__(self) -> None:
        self._group: Any = None

    def open(self, group: Group, timeout_s: float) -> None:
        self._group = _join(group.host, group.port, 0, group.world, timeout_s)

    def send(self, tensors: Mapping[str, torch.Tensor], timeout_s: float) -> None:
        import torch

        for bucket in in_buckets(tensors, BUCKET_BYTES):
            _broadcast(self._group, torch.cat([_bytes(tensor) for tensor in bucket.values()]), timeout_s)

    def close(self) -> None:
        self._group = None


class GlooReceiver:
    """A worker's end of a group.

    Args:
        membership: of the worker's engine.
        rank: of the worker in the group.
        timeout_s: timeout of each broadcast, in seconds.
    """

    def __init__(self, membership: Membership, rank: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._group = _join(membership.host, membership.port, rank, membership.world, timeout_s)

    def receive(self, forms: Mapping[str, torch.Tensor]) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Receive the tensors that the sender sends, some at a time.

        Args:
            forms: tensors of the same names, dtypes and shapes on the meta device, in the order of sending.
        """
        import torch

        for bucket in in_buckets(forms, BUCKET_BYTES):
            sizes = [form.nbytes for form in bucket.values()]
            arrived = torch.empty(sum(sizes), dtype=torch.uint8)
            _broadcast(self._group, arrived, self._timeout_s)
            parts = zip(bucket.items(), torch.split(arrived, sizes), strict=True)
            # Tensors are sorted by the size of their elements (`payload.Layout`): each part is aligned.
            yield [(name, part.view(form.dtype).view(form.shape)) for (name, form), part in parts]

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


def _join(host: str, port: int, rank: int, world: int, timeout_s: float) -> Any:
    from torch._C._distributed_c10d import ProcessGroupGloo, TCPStore

    limit = timedelta(seconds=timeout_s)
    store = TCPStore(host, port, is_master=rank == 0, timeout=limit, wait_for_workers=False)
    return ProcessGroupGloo(store, rank, world, limit)


def _broadcast(group: Any, tensor: torch.Tensor, timeout_s: float) -> None:
    """Send a tensor from rank 0, or receive it there. RuntimeError if a member is lost or `timeout_s` is over."""
    from torch.distributed import BroadcastOptions

    group.broadcast([tensor], BroadcastOptions()).wait(timedelta(seconds=timeout_s))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8)
