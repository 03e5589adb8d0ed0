"""The workers' end of a weight update in vLLM's weight-transfer protocol: from shared memory, or through NCCL or gloo.

vLLM's layer-wise reload loads each layer as at start, processes it for its kernels, and copies the result to where the
kernels and CUDA graphs read it. What vLLM derives from weights elsewhere, and only once, is derived again here.

Invariants
- Weights have checkpoint names and layout. An update that lacks a parameter of the model is an error, and so is a
  model's loader that bypasses the reload. Parts of a larger model beside its language model (a vision tower), which are
  not trained, are loaded from the model's folder again.
- After an update nothing that is computed from weights is older than the update (`_Derived`).
- A receiver of a collective transfer checks in first. Over NCCL each bucket is loaded as it arrives, and the digest is
  verified before the update is finished. Over gloo all of it arrives, in host memory, and is verified before the model
  is touched: a transfer that is lost changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from services.model_folder import read_others, read_weights
from services.weights.adapter import is_adapter, merging
from services.weights.collective import Incoming
from services.weights.digest import Digest
from services.weights.gloo import GlooReceiver
from services.weights.ipc import IpcReceiver
from services.weights.memory import Mappings, MemoryName
from services.weights.nccl import group_facts
from services.weights.payload import unpack
from services.weights.rendezvous import check_in
from services.weights.rounds import Membership

if TYPE_CHECKING:
    import torch

BACKEND = "anchorage"


def update_facts(incoming: Incoming) -> dict[str, Any]:
    """Fields of the workers' `UpdateInfo`, as plain data."""
    return {
        "names": [meta.name for meta in incoming.tensors],
        "dtype_names": [meta.dtype for meta in incoming.tensors],
        "shapes": [list(meta.shape) for meta in incoming.tensors],
        "checksum": incoming.version.checksum,
    }


def joining_facts(incoming: Incoming) -> dict[str, Any]:
    """Fields of the workers' `JoinInfo`, as plain data."""
    return {
        "membership": asdict(incoming.membership),
        "update": update_facts(incoming),
        "timeout_s": incoming.timeout_s,
    }


def register_weight_transfer() -> None:
    """Register the `anchorage` backend with vLLM in this process. Idempotent; does not import the backend.

    In tensor-parallel workers, which are separate processes, vLLM calls this as a `vllm.general_plugins` entry point.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, weight_transfer.__name__)


@dataclass
class UpdateInfo:
    """An update to load.

    Attributes:
        memory: fields of the `MemoryName` of the file with the weights; None: they come through the process group.
        names: of the tensors, in the order of arrival.
        dtype_names: of the tensors.
        shapes: of the tensors.
        checksum: digest of the tensors.
    """

    memory: dict[str, Any] | None = None
    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    checksum: str = ""

    def forms(self) -> dict[str, torch.Tensor]:
        """The tensors by name, in the order of arrival, on the meta device."""
        import torch

        kinds = zip(self.names, self.dtype_names, self.shapes, strict=True)
        return {name: torch.empty(shape, dtype=getattr(torch, kind), device="meta") for name, kind, shape in kinds}


@dataclass
class JoinInfo:
    """What a worker needs to take part in a collective transfer.

    Attributes:
        membership: fields of the engine's `services.weights.rounds.Membership`.
        update: fields of the `UpdateInfo` of what will be sent.
        timeout_s: of the transfer, in seconds.
    """

    membership: dict[str, Any]
    update: dict[str, Any]
    timeout_s: float


class Loading:
    """Passes tensors to the model's own loader, and records which parameters were loaded.

    Args:
        model: vLLM's.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._loaded: set[str] | None = set()

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensors, by checkpoint names."""
        loaded = self._model.load_weights(tensors)
        self._loaded = None if loaded is None or self._loaded is None else self._loaded | loaded

    def require_reloaded(self) -> None:
        """Raise ValueError if a layer's weights bypassed the layer-wise reload, and so are lost."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        for prefix, layer in self._model.named_modules():
            info = get_layerwise_info(layer)
            if not info.can_load() or info.load_numel > 0 or not info.load_numel_total:
                continue
            for name in layer._parameters:
                if f"{prefix}.{name}" in (self._loaded or ()):
                    raise ValueError(f"vLLM's loader of {type(self._model).__name__} does not reload {prefix}.{name}")

    def require(self, expected: set[str]) -> None:
        """Raise ValueError if a parameter was not loaded, as far as vLLM's model reports what was."""
        missing = sorted(expected - self._loaded) if self._loaded is not None else []
        if missing:
            raise ValueError(f"the update lacks {len(missing)} parameters of the model, first {missing[0]}")


def weight_transfer(config: Any, vllm_config: Any, device: Any, model: Any) -> Any:
    """Create the weight-transfer engine of a worker.

    vLLM calls this in place of a class. The class is defined inside because its base class is vLLM's, which this module
    does not import.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngine
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    class WeightTransfer(WeightTransferEngine[Any, Any]):  # type: ignore[misc]
        init_info_cls = JoinInfo
        update_info_cls = UpdateInfo
        supports_draft_weight_update = False

        def __init__(self) -> None:
            super().__init__(config, vllm_config, device, model)
            self._expected = {name for name, _ in model.named_parameters()}
            self._trained = _language_parameters(model)
            self._derived = _Derived(model)
            self._folder = Path(vllm_config.model_config.model)
            self._epoch = ""
            self._receiver: _Receiver | None = None
            self._mappings = Mappings()

        def init_transfer_engine(self, init_info: JoinInfo) -> None:
            us = Membership(**init_info.membership)
            rank = us.first_rank + self.parallel_config.rank
            check_in(us.host, us.check_in_port, rank, us.world, us.check_in_timeout_s)
            try:
                if us.epoch != self._epoch:
                    self.shutdown()
                    if us.transport == "nccl":
                        self._receiver = _NcclReceiver(config, vllm_config, device, model, us)
                    elif us.transport == "ipc":
                        self._receiver = _IpcReceiver(us, rank, init_info.timeout_s)
                    else:
                        self._receiver = _GlooReceiver(us, rank, init_info.timeout_s)
                    self._epoch = us.epoch
                assert self._receiver is not None
                self._receiver.prepare(UpdateInfo(**init_info.update))
            except Exception:
                self.shutdown()  # the group is lost
                raise

        def start_weight_update(self) -> None:
            self._derived.forget()
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: UpdateInfo) -> None:
            loading = Loading(self.model)
            names = self._load(update_info, loading)
            loading.require(self._trained)
            if self._trained != self._expected:
                loading.load_weights(read_others(self._folder, names))
                loading.require(self._expected)
            loading.require_reloaded()

        def _load(self, update: UpdateInfo, loading: Loading) -> set[str]:
            """Load what the update has, or the model with its adapters. Returns the names of the tensors."""
            if update.memory is not None:
                payload, _ = self._mappings.open(MemoryName(**update.memory))
                tensors = unpack(payload)
                loading.load_weights(tensors.items())
                return set(tensors)
            assert self._receiver is not None
            if not is_adapter(update.names):
                self._receiver.receive(update, loading.load_weights)
                return set(update.names)
            adapter: dict[str, torch.Tensor] = {}
            self._receiver.receive(update, adapter.update)
            base = read_weights(self._folder)
            loading.load_weights(merging(adapter, base))
            return set(base)

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            self._derived.renew()

        def shutdown(self) -> None:
            receiver, self._receiver, self._epoch = self._receiver, None, ""
            if receiver is not None:
                receiver.shutdown()

    return WeightTransfer()


Load = Callable[[list[tuple[str, "torch.Tensor"]]], object]
"""Loads some tensors, by checkpoint names."""


class _Receiver(Protocol):
    """A worker's end of a process group."""

    def prepare(self, update: UpdateInfo) -> None:
        """Called before the model is touched: an error here changes nothing."""

    def receive(self, update: UpdateInfo, load: Load) -> None:
        """Receive the update and load it. Raises ValueError if its digest is wrong."""

    def shutdown(self) -> None:
        """Leave the group."""


class _NcclReceiver:
    """vLLM's NCCL engine, in the group of an epoch. What arrives is in the card's memory, so it is loaded at once."""

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any, us: Membership) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferInitInfo

        self._engine = NCCLWeightTransferEngine(config, vllm_config, device, model)
        facts = group_facts(us.host, us.port, us.world)
        self._engine.init_transfer_engine(NCCLWeightTransferInitInfo(rank_offset=us.first_rank, **facts))

    def prepare(self, update: UpdateInfo) -> None:
        pass

    def receive(self, update: UpdateInfo, load: Load) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

        seen = Digest()
        self._engine.model = _Checked(seen, load)
        self._engine.receive_weights(NCCLWeightTransferUpdateInfo(update.names, update.dtype_names, update.shapes))
        _require(seen, update)

    def shutdown(self) -> None:
        self._engine.shutdown()


class _Checked:
    """A model, as vLLM's NCCL engine sees it: computes the digest of what it loads."""

    def __init__(self, seen: Digest, load: Load) -> None:
        self._seen = seen
        self._load = load

    def load_weights(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self._seen.include(tensors)
        self._load(tensors)


class _GlooReceiver:
    """Receives into host memory: of the whole update before the model is touched."""

    def __init__(self, us: Membership, rank: int, timeout_s: float) -> None:
        self._receiver = GlooReceiver(us, rank, timeout_s)
        self._arrived: list[tuple[str, torch.Tensor]] = []

    def prepare(self, update: UpdateInfo) -> None:
        self._arrived = []
        seen = Digest()
        for bucket in self._receiver.receive(update.forms()):
            seen.include(bucket)
            self._arrived += bucket
        _require(seen, update)

    def receive(self, update: UpdateInfo, load: Load) -> None:
        arrived, self._arrived = self._arrived, []
        load(arrived)

    def shutdown(self) -> None:
        self._receiver.shutdown()


class _IpcReceiver:
    """Maps the learner's snapshot in the memory of the card that both use, and verifies it before loading it."""

    def __init__(self, us: Membership, rank: int, timeout_s: float) -> None:
        self._receiver = IpcReceiver(us, rank, timeout_s)
        self._mapped: list[tuple[str, torch.Tensor]] = []

    def prepare(self, update: UpdateInfo) -> None:
        self._mapped = self._receiver.receive(update.forms())
        seen = Digest()
        seen.include(self._mapped)
        _require(seen, update)

    def receive(self, update: UpdateInfo, load: Load) -> None:
        import torch

        mapped, self._mapped = self._mapped, []
        if is_adapter(update.names):  # they are read after this
            mapped = [(name, tensor.clone()) for name, tensor in mapped]
        load(mapped)
        torch.accelerator.synchronize()
        del mapped
        self._receiver.loaded()

    def shutdown(self) -> None:
        self._receiver.shutdown()


def _require(seen: Digest, update: UpdateInfo) -> None:
    if seen.hex() != update.checksum:
        raise ValueError("damaged weights: the checksum does not match")


class _Derived:
    """What vLLM computes from weights only once, outside the layer-wise reload.

    - A tied output head owns no weight, so the reload does not repack it for the CPU's kernels.
    - For some kernels (all on CPUs) experts are packed when the kernel is constructed, not with each processing.
    - A layer of experts with a gated shared expert concatenates the weights of both gates in its first forward pass.
    - A model may have a hook of its own that runs after loading.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._tied = _tied_modules(model)
        self._forgotten: list[Any] = []

    def forget(self) -> None:
        """Before a reload: drop kernels that pack at construction, so that the reload constructs them again."""
        self._forgotten = []
        for module in self._model.modules():
            method: Any = getattr(module, "quant_method", None)
            experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
            if experts is not None and _packs_once(experts):
                method.moe_kernel = None
                self._forgotten.append(module)

    def renew(self) -> None:
        """After a reload: derive everything again, into the same tensors, because CUDA graphs hold their addresses."""
        import torch

        for module in self._tied:
            module.quant_method.process_weights_after_loading(module)
        for module in self._forgotten:
            if module.quant_method.moe_kernel is None:
                raise ValueError(f"vLLM's loader of {type(self._model).__name__} does not reload its experts")
        for module in self._model.modules():
            joined = getattr(module, "_combined_gate_weight", None)
            if joined is not None:
                joined.copy_(torch.cat([module.gate.weight, module.shared_expert_gate.weight]))
        hook = getattr(self._model, "process_weights_after_loading", None)
        if hook is not None:
            hook()


def _packs_once(experts: Any) -> bool:
    """Whether a kernel of experts processes weights itself, which vLLM calls only at its construction."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts

    return type(experts).process_weights_after_loading is not FusedMoEExperts.process_weights_after_loading


def _language_parameters(model: Any) -> set[str]:
    """Names of the parameters of a model's language model; of all parameters if it is one itself."""
    names = {name for name, _ in model.named_parameters()}
    inner = model.get_language_model() if hasattr(model, "get_language_model") else model
    prefix = next((prefix for prefix, module in model.named_modules() if module is inner and prefix), None)
    return names if prefix is None else {name for name in names if name.startswith(f"{prefix}.")}


def _tied_modules(model: Any) -> list[Any]:
    """Modules whose weight another module owns (a tied output head), which a reload alone does not repack."""
    owned: set[int] = set()
    tied = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if id(weight) in owned and hasattr(module, "quant_method"):
            tied.append(module)
        owned.add(id(weight))
    return tied
