"""The receiving end of a collective transfer over gloo, without an engine."""

from __future__ import annotations

import torch

from services.weights.collective import Incoming
from services.weights.digest import digest
from services.weights.gloo import GlooReceiver
from services.weights.rendezvous import check_in


class Receiver:
    """The receiving end of an engine, of one worker."""

    def __init__(self) -> None:
        self.epoch = ""
        self._receiver: GlooReceiver | None = None

    def load(self, incoming: Incoming) -> dict[str, torch.Tensor]:
        us = incoming.membership
        check_in(us.host, us.check_in_port, us.first_rank, us.world, us.check_in_timeout_s)
        if us.epoch != self.epoch:
            self._receiver = GlooReceiver(us, us.first_rank, incoming.timeout_s)
            self.epoch = us.epoch
        assert self._receiver is not None
        forms = {
            meta.name: torch.empty(meta.shape, dtype=getattr(torch, meta.dtype), device="meta")
            for meta in incoming.tensors
        }
        received = dict(pair for bucket in self._receiver.receive(forms) for pair in bucket)
        assert digest(received.items()) == incoming.version.checksum
        return received
