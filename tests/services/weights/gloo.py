"""A collective transfer over gloo: both ends, on the CPU; what NCCL does on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import ProcessGroupGloo, TCPStore
from torch.distributed import BroadcastOptions

from services.weights.collective import Incoming, Sender
from services.weights.digest import digest
from services.weights.rendezvous import check_in
from services.weights.rounds import Group


def join(host: str, port: int, rank: int, world: int, timeout_s: float) -> Any:
    limit = timedelta(seconds=timeout_s)
    store = TCPStore(host, port, is_master=rank == 0, timeout=limit, wait_for_workers=False)
    return ProcessGroupGloo(store, rank, world, limit)


class GlooSender(Sender):
    def __init__(self) -> None:
        self._group: Any = None

    def open(self, group: Group, timeout_s: float) -> None:
        self._group = join(group.host, group.port, 0, group.world, timeout_s)

    def send(self, tensors: Mapping[str, torch.Tensor], timeout_s: float) -> None:
        for tensor in tensors.values():
            self._group.broadcast([tensor], BroadcastOptions()).wait(timedelta(seconds=timeout_s))

    def close(self) -> None:
        self._group = None


class GlooReceiver:
    """An engine's end, of one worker."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.epoch = ""
        self._group: Any = None

    def load(self, incoming: Incoming) -> dict[str, torch.Tensor]:
        us = incoming.membership
        check_in(us.host, us.check_in_port, us.first_rank, us.world, us.check_in_timeout_s)
        if us.epoch != self.epoch:
            self._group = join(us.host, us.port, us.first_rank, us.world, self._timeout_s)
            self.epoch = us.epoch
        received = {}
        for meta in incoming.tensors:
            received[meta.name] = torch.empty(meta.shape, dtype=getattr(torch, meta.dtype))
            self._group.broadcast([received[meta.name]], BroadcastOptions()).wait(timedelta(seconds=self._timeout_s))
        assert digest(received.items()) == incoming.version.checksum
        return received
