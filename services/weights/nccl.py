"""The publisher's end of a transfer over NCCL: vLLM's weight-transfer engine. The only file here that knows it.

Learner rank 0 sends from its own card. The snapshot is in host memory that CUDA has pinned, so that two buckets are
under way at any time: one is copied to the card while the one before it is broadcast.

Invariants
- Wire format and buffers are vLLM's: the other end, in the actors, is its receiving engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from services.weights.collective import Sender
from services.weights.errors import WeightsUnavailable
from services.weights.rounds import Group

if TYPE_CHECKING:
    import torch

BUFFER_BYTES = 256 * 2**20
BUFFERS = 2


def group_facts(host: str, port: int, world: int) -> dict[str, Any]:
    """The arguments of vLLM's engines that must be equal at both ends of a group."""
    return {
        "master_address": host,
        "master_port": port,
        "world_size": world,
        "packed": True,
        "packed_buffer_size_bytes": BUFFER_BYTES,
        "packed_num_buffers": BUFFERS,
    }


class NcclSender(Sender):
    """Rank 0 of a group, on a GPU of this process on which no receiver of the group runs."""

    def __init__(self, gpu: int = 0) -> None:
        self._gpu = gpu
        self._engine: Any = None

    def open(self, group: Group, timeout_s: float) -> None:
        import torch
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        if not torch.cuda.is_available():
            raise WeightsUnavailable("weights.channel=nccl needs a GPU in the process of learner rank 0")
        info = NCCLTrainerInitInfo(rank=0, **group_facts(group.host, group.port, group.world))
        with torch.cuda.device(self._gpu):
            self._engine = NCCLTrainerWeightTransferEngine.trainer_init(info, client=_NoClient(), source=_Source())

    def send(self, tensors: Mapping[str, torch.Tensor], timeout_s: float) -> None:
        import torch

        source = self._engine.source
        source.tensors = tensors
        try:
            with torch.cuda.device(self._gpu):
                self._engine.send_weights()
        finally:
            source.tensors = {}

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()  # ncclCommAbort: also ends a broadcast that hangs


class _NoClient:
    """vLLM's client of the inference side. It has nothing to do: each engine joins its round by itself."""

    def init_weight_transfer_engine(self, init_info: object) -> None:
        """Each engine joins by itself."""

    def start_weight_update(self) -> None:
        """Each engine does it by itself."""

    def update_weights(self, update_info: object) -> None:
        """The tensors were announced with the version."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Each engine does it by itself."""


class _Source:
    """vLLM's source of weights: the tensors of a version, copied to the GPU by the stream that sends their bucket."""

    def __init__(self) -> None:
        self.tensors: Mapping[str, torch.Tensor] = {}

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.tensors.items():
            yield name, tensor.to("cuda", non_blocking=True)
