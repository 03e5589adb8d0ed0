"""The workers' end of a weight update in vLLM's weight-transfer protocol: from memory that is shared, or through NCCL.

vLLM's layer-wise reload loads each layer as at start, processes it for its kernels, and copies the result to where the
kernels and CUDA graphs read it. What vLLM derives from weights elsewhere, and only once, is derived again here.

Invariants
- Weights have checkpoint names and layout. An update that lacks a parameter of the model is an error, and so is a
  model's loader that bypasses the reload. Parts of a larger model beside its language model (a vision tower), which are
  not trained, are loaded from the model's folder again.
- After an update nothing that is computed from weights is older than the update (`_Derived`).
- A receiver through NCCL checks in first, and verifies the digest of what it received before the update is finished.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.model_folder import read_others
from services.weights.collective import Incoming
from services.weights.digest import Digest
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


class Loading:
    """Passes tensors to the model's own loader, and records which parameters were loaded.

    Args:
        model: vLLM's.
        checked: whether to compute the digest of the tensors.

    Attributes:
        digest: of the tensors so far.
    """

    def __init__(self, model: Any, *, checked: bool) -> None:
        self._model = model
        self._checked = checked
        self._loaded: set[str] | None = set()
        self.digest = Digest()

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensors of the update, by checkpoint names."""
        arrived = list(tensors) if self._checked else tensors
        if self._checked:
            for name, tensor in arrived:
                self.digest.add(name, tensor)
        loaded = self._model.load_weights(arrived)
        self._loaded = None if loaded is None or self._loaded is None else self._loaded | loaded

    def complete(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensors that the update does not contain; they do not count for the digest."""
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
        init_info_cls = Membership
        update_info_cls = UpdateInfo
        supports_draft_weight_update = False

        def __init__(self) -> None:
            super().__init__(config, vllm_config, device, model)
            self._expected = {name for name, _ in model.named_parameters()}
            self._trained = _language_parameters(model)
            self._derived = _Derived(model)
            self._folder = Path(vllm_config.model_config.model)
            self._epoch = ""
            self._receiver: Any = None
            self._mappings = Mappings()

        def init_transfer_engine(self, init_info: Membership) -> None:
            rank = init_info.first_rank + self.parallel_config.rank
            check_in(init_info.host, init_info.check_in_port, rank, init_info.world, init_info.check_in_timeout_s)
            if init_info.epoch != self._epoch:
                self.shutdown()
                self._receiver = _nccl_receiver(config, vllm_config, device, model, init_info)
                self._epoch = init_info.epoch

        def start_weight_update(self) -> None:
            self._derived.forget()
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: UpdateInfo) -> None:
            loading = Loading(self.model, checked=update_info.memory is None)
            names = self._load(update_info, loading)
            loading.require(self._trained)
            if self._trained != self._expected:
                loading.complete(read_others(self._folder, names))
                loading.require(self._expected)
            loading.require_reloaded()

        def _load(self, update: UpdateInfo, loading: Loading) -> list[str]:
            if update.memory is None:
                return _receive(self._receiver, update, loading)
            payload, _ = self._mappings.open(MemoryName(**update.memory))
            tensors = unpack(payload)
            loading.load_weights(tensors.items())
            return list(tensors)

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            self._derived.renew()

        def shutdown(self) -> None:
            receiver, self._receiver, self._epoch = self._receiver, None, ""
            if receiver is not None:
                receiver.shutdown()

    return WeightTransfer()


def _nccl_receiver(config: Any, vllm_config: Any, device: Any, model: Any, info: Membership) -> Any:
    """vLLM's NCCL engine, in the group of an epoch."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferInitInfo

    receiver = NCCLWeightTransferEngine(config, vllm_config, device, model)
    facts = group_facts(info.host, info.port, info.world)
    receiver.init_transfer_engine(NCCLWeightTransferInitInfo(rank_offset=info.first_rank, **facts))
    return receiver


def _receive(receiver: Any, update: UpdateInfo, loading: Loading) -> list[str]:
    """Load the tensors that arrive; return their names. Raises ValueError if their digest is wrong."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

    receiver.model = loading
    receiver.receive_weights(NCCLWeightTransferUpdateInfo(update.names, update.dtype_names, update.shapes))
    if loading.digest.hex() != update.checksum:
        raise ValueError("damaged weights: the checksum does not match")
    return update.names


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
