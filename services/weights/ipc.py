"""Both ends of a transfer between processes that share a card: the snapshot stays in its memory, and receivers map it.

The mechanism is that of vLLM's `ipc` engine: CUDA IPC as torch exports it. vLLM's trainer end is not used, because it
gathers over all learner ranks, which are at the next update by then. Handles go through a store of the group, as JSON.

Invariants
- The snapshot is exported once for each receiver and round: torch counts the references so.
- It is not written while it is announced or a round uses it. So it is announced no more before the next one is taken:
  the card has no room for two.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from services.weights.collective import Sender
from services.weights.errors import WeightsUnavailable
from services.weights.payload import Layout
from services.weights.rounds import Group, Membership

if TYPE_CHECKING:
    import torch

_POLL_S = 0.005


class CardMemory:
    """Memory of this process's card for one snapshot.

    Args:
        nbytes: its size.
        device: `cuda`; a test has another.

    Attributes:
        nbytes: its size.
    """

    def __init__(self, nbytes: int, device: str = "cuda") -> None:
        import torch

        self.nbytes = nbytes
        self._flat = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._tensors: dict[str, torch.Tensor] = {}
        self._uses: weakref.WeakSet[_Use] = weakref.WeakSet()

    def places(self, layout: Layout) -> dict[str, torch.Tensor]:
        self._tensors = {
            name: self._flat[begin:end].view(dtype).view(shape) for name, dtype, shape, begin, end in layout.entries()
        }
        return self._tensors

    def unlock(self) -> None:
        """Nothing is locked: the pool has one snapshot."""

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._tensors

    def keep(self) -> object:
        use = _Use()
        self._uses.add(use)
        return use

    @property
    def kept(self) -> bool:
        """Whether what `keep` returned is still referenced."""
        return len(self._uses) > 0


class _Use:
    """Stands for one use of a card's memory."""


class CardPool:
    """The one snapshot of a publisher, for version after version.

    Args:
        timeout_s: how long to wait for a round that uses it, in seconds.
        device: see `CardMemory`.
    """

    def __init__(self, timeout_s: float, device: str = "cuda") -> None:
        self._timeout_s = timeout_s
        self._device = device
        self._memory: CardMemory | None = None

    def take(self, nbytes: int) -> CardMemory:
        """The memory, once no round uses it. Raises WeightsUnavailable."""
        deadline = time.monotonic() + self._timeout_s
        while self._memory is not None and self._memory.kept:
            if time.monotonic() > deadline:
                raise WeightsUnavailable(f"an engine maps the weights for longer than {self._timeout_s:g} s")
            time.sleep(_POLL_S)
        if self._memory is None or self._memory.nbytes != nbytes:
            self._memory = None  # freed before the next one is allocated
            self._memory = CardMemory(nbytes, self._device)
        return self._memory


class IpcSender(Sender):
    """Rank 0 of a group: exports what the receivers map."""

    def __init__(self) -> None:
        self._store: Any = None
        self._world = 0
        self._sent = 0

    def open(self, group: Group, timeout_s: float) -> None:
        self._store, self._world = _store(group.host, group.port, timeout_s, master=True), group.world

    def send(self, tensors: Mapping[str, torch.Tensor], timeout_s: float) -> None:
        self._sent += 1
        ranks = range(1, self._world)
        for rank in ranks:
            self._store.set(f"{self._sent}/handle/{rank}", json.dumps(exported(tensors)))
        self._store.wait([f"{self._sent}/loaded/{rank}" for rank in ranks], timedelta(seconds=timeout_s))

    def close(self) -> None:
        self._store = None


class IpcReceiver:
    """A worker's end of a group.

    Args:
        membership: of the worker's engine.
        rank: of the worker in the group.
        timeout_s: how long to wait for the publisher, in seconds.
    """

    def __init__(self, membership: Membership, rank: int, timeout_s: float) -> None:
        self._store = _store(membership.host, membership.port, timeout_s, master=False)
        self._rank = rank
        self._received = 0

    def receive(self, forms: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """Map the tensors that the sender has. They are readable until `loaded`.

        Args:
            forms: tensors of the same names, dtypes and shapes on the meta device, in the order of sending.

        Raises:
            ValueError: they are on another card.
        """
        self._received += 1
        return mapped(json.loads(self._store.get(f"{self._received}/handle/{self._rank}")), forms)

    def loaded(self) -> None:
        """Say that the tensors are not needed any more."""
        self._store.set(f"{self._received}/loaded/{self._rank}", "1")

    def shutdown(self) -> None:
        """Leave the group."""
        self._store = None


def exported(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What another process needs to map tensors that lie one after the other in the memory of a card.

    Plain data: CUDA's handles, where the first tensor begins, and which card it is.
    """
    import torch

    first = next(iter(tensors.values()))
    storage = first.untyped_storage()
    device, handle, size, offset, counter, place, event, sync = storage._share_cuda_()  # type: ignore[no-untyped-call]
    return {
        "card": str(torch.cuda.get_device_properties(device).uuid),
        "begin": first.storage_offset() * first.element_size(),
        "handle": handle.hex(),
        "size": size,
        "offset": offset,
        "counter": counter.hex(),
        "place": place,
        "event": event.hex(),
        "sync": sync,
    }


def mapped(facts: Mapping[str, Any], forms: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """The tensors that `exported` describes, without a copy. Raises ValueError if they are on another card."""
    import torch

    device = torch.cuda.current_device()
    here = str(torch.cuda.get_device_properties(device).uuid)
    if here != facts["card"]:
        raise ValueError(f"the learner's weights are on card {facts['card']}, this engine is on {here}: use ray")
    storage = torch.UntypedStorage._new_shared_cuda(
        device,
        bytes.fromhex(facts["handle"]),
        facts["size"],
        facts["offset"],
        bytes.fromhex(facts["counter"]),
        facts["place"],
        bytes.fromhex(facts["event"]),
        facts["sync"],
    )
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return views(flat, facts["begin"], forms)


def views(flat: torch.Tensor, begin: int, forms: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Tensors that lie one after the other in `flat`, uint8 [N], from byte `begin` on."""
    found = []
    for name, form in forms.items():
        end = begin + form.nbytes
        found.append((name, flat[begin:end].view(form.dtype).view(form.shape)))
        begin = end
    return found


def _store(host: str, port: int, timeout_s: float, *, master: bool) -> Any:
    from torch._C._distributed_c10d import TCPStore

    limit = timedelta(seconds=timeout_s)
    return TCPStore(host, port, is_master=master, timeout=limit, wait_for_workers=False)
