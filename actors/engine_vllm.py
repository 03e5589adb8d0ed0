"""The adapter to vLLM: the only file that knows it.

The engine core runs in this process and is stepped by one worker thread, which is the only one that ever touches it:
requests are added, weights are changed and versions are labelled between two steps, never during one. (`AsyncLLM`
needs a core in a process of its own.) vLLM is imported when an engine starts, not with this module.

Invariants
- Weights change by vLLM's weight-update protocol only: pause with requests kept, start / update / finish, reset of the
  prefix cache, version label, resume. The layerwise reload in start and finish repacks every linear layer; writing into
  the parameters alone would leave the CPU kernels, which read packed copies, on the old weights without an error.
- The reset recomputes the cache of running requests too: each token is sampled wholly under the version in its span.
- Async scheduling is off: a batch launched before an update would be labelled with the version after it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from actors.engine import EngineFailed, EngineStats, InferenceEngine, Sample
from services.config.tree import ModelConfig, RolloutConfig
from services.model_folder import check_model_folder, read_weights
from services.schemas import VersionSpan
from services.weights.adapter import is_adapter, merged

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

BACKEND = "anchorage"
UPDATE_TIMEOUT_S = 300.0
CPU_BLOCK_TOKENS = 32
CPU_BATCH_TOKENS = 2048


def engine_environment() -> dict[str, str]:
    """Environment variables an engine's process needs before torch and vLLM are imported."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def register_weight_transfer() -> None:
    """Make the `anchorage` backend known to vLLM in this process. Idempotent, and imports nothing of the backend.

    Tensor-parallel workers are processes of their own: there vLLM calls this as a `vllm.general_plugins` entry point.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, host_weight_transfer.__name__)


def host_weight_transfer(config: Any, vllm_config: Any, device: Any, model: Any) -> Any:
    """The weight-transfer engine of a worker: loads a safetensors file, checkpoint names and layout.

    vLLM calls this like the class it stands for; the class is made here because its base is vLLM's.
    """
    from safetensors import safe_open
    from vllm.distributed.weight_transfer import WeightTransferEngine
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class InitInfo:
        """Nothing to agree on beforehand."""

    @dataclass
    class UpdateInfo:
        path: str

    class HostWeightTransfer(WeightTransferEngine[Any, Any]):  # type: ignore[misc]
        init_info_cls = InitInfo
        update_info_cls = UpdateInfo
        supports_draft_weight_update = False

        def __init__(self) -> None:
            super().__init__(config, vllm_config, device, model)
            self._expected = {name for name, _ in model.named_parameters()}
            self._tied = _tied_modules(model)

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            """Nothing to do."""

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: UpdateInfo) -> None:
            with safe_open(update_info.path, framework="pt") as file:
                names = list(file.keys())
                loaded = self.model.load_weights((name, file.get_tensor(name)) for name in names)
            missing = sorted(self._expected - loaded) if loaded is not None else []
            if missing:
                raise ValueError(f"the update lacks {len(missing)} parameters of the model, first {missing[0]}")

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            for module in self._tied:
                module.quant_method.process_weights_after_loading(module)

        def shutdown(self) -> None:
            """Nothing is held between updates."""

    return HostWeightTransfer()


def _tied_modules(model: Any) -> list[Any]:
    """Modules whose weight another module owns (a tied output head): a reload alone does not repack them."""
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


class VllmEngine(InferenceEngine):
    """One vLLM engine with continuous batching. Not reusable after `stop`."""

    def __init__(self, model: ModelConfig, rollout: RolloutConfig, seed: int = 0) -> None:
        self._model = model
        self._rollout = rollout
        self._seed = seed
        self._engine: Any = None
        self._base: dict[str, torch.Tensor] | None = None
        self._version = 0
        self._stats = EngineStats()
        self._failure: EngineFailed | None = EngineFailed("the engine has not been started")
        self._ids = itertools.count()
        self._waiting: dict[str, asyncio.Future[Sample]] = {}
        self._wake = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm")

    @property
    def version(self) -> int:
        return self._version

    def stats(self) -> EngineStats:
        return replace(self._stats, running=len(self._waiting))

    async def start(self) -> None:
        check_model_folder(self._model.path)
        try:
            await self._call(self._create)
        except Exception as error:
            logger.exception("vLLM cannot start")
            raise EngineFailed(f"vLLM cannot start with {self._model.path}: {_line(error)}") from error
        self._failure = None
        self._stepping = asyncio.create_task(self._step_while_needed())

    async def generate(self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int) -> Sample:
        if self._failure is not None:
            raise self._failure
        context = self._model.max_prompt_tokens + self._model.max_response_tokens
        if not 0 < len(prompt_ids) <= context - max_tokens:
            raise ValueError(f"{len(prompt_ids)} prompt tokens and {max_tokens} to sample do not fit {context} tokens")
        request = str(next(self._ids))
        future: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        self._waiting[request] = future
        try:
            await self._call(self._add, request, list(prompt_ids), temperature, max_tokens, seed)
            self._wake.set()
            return await future
        except asyncio.CancelledError:
            if self._failure is None:
                self._thread.submit(self._engine.abort_request, [request])
            raise
        finally:
            del self._waiting[request]

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            memory = await asyncio.to_thread(_to_memory_file, await asyncio.to_thread(self._whole, tensors))
            try:
                await self._call(self._update, version, f"/proc/{os.getpid()}/fd/{memory}")
            finally:
                os.close(memory)
        except Exception as error:
            self._fail(f"vLLM cannot load version {version}: {_line(error)}")
            logger.exception("vLLM cannot load version %d", version)
            assert self._failure is not None
            raise self._failure from error

    def _whole(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The model that a version stands for: adapters are added to the weights that the run began with."""
        if not is_adapter(tensors):
            return tensors
        if self._base is None:
            self._base = read_weights(self._model.path)
        return merged(tensors, self._base)

    async def stop(self) -> None:
        if self._engine is not None:
            self._fail("the engine has been stopped")
            if self._stepping is not None:
                self._stepping.cancel()
            await self._call(self._engine.engine_core.shutdown)
            self._engine = None
        self._thread.shutdown(wait=False)

    async def _call(self, function: Any, *args: Any) -> Any:
        """Run between two steps, on the engine's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def _step_while_needed(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                unfinished = True
                while unfinished:
                    samples, unfinished = await self._call(self._step)
                    for request, sample in samples:
                        future = self._waiting.get(request)
                        if future is not None and not future.done():
                            future.set_result(sample)
        except Exception as error:
            logger.exception("vLLM stopped working")
            self._fail(f"vLLM stopped working: {_line(error)}")

    def _fail(self, reason: str) -> None:
        self._failure = EngineFailed(reason)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EngineFailed(reason))

    # Everything below runs on the engine's thread.

    def _create(self) -> None:
        os.environ.update(engine_environment())
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        # It warns of every layer without parameters on every update; missing parameters are an error here anyway.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        register_weight_transfer()
        cpu = current_platform.is_cpu()
        context = self._model.max_prompt_tokens + self._model.max_response_tokens
        arguments = EngineArgs(
            model=str(self._model.path),
            dtype=self._model.dtype,
            seed=self._seed,
            max_model_len=context,
            max_num_seqs=self._rollout.episodes_in_flight,
            tensor_parallel_size=self._rollout.tensor_parallel,
            gpu_memory_utilization=self._rollout.gpu_memory_utilization,
            kv_cache_memory_bytes=self._rollout.kv_cache_mib * 2**20 if cpu else None,
            enforce_eager=cpu,
            # Chunks of a seeded request's prefill end vLLM on the CPU: it rewinds a generator without an offset.
            enable_chunked_prefill=not cpu,
            max_num_batched_tokens=max(CPU_BATCH_TOKENS, context) if cpu else None,
            enable_prefix_caching=True,
            # Whole blocks are cached: with the CPU's 128 tokens most of a step's prefill would be done again.
            block_size=CPU_BLOCK_TOKENS if cpu else None,
            async_scheduling=False,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            disable_log_stats=True,
            weight_transfer_config={"backend": BACKEND},
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._engine.set_weight_version(str(self._version))

    def _add(self, request: str, prompt_ids: list[int], temperature: float, max_tokens: int, seed: int) -> None:
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            seed=seed,
            max_tokens=max_tokens,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(request, tokens_input(prompt_ids), params)

    def _step(self) -> tuple[list[tuple[str, Sample]], bool]:
        samples = [(output.request_id, self._sample(output)) for output in self._engine.step() if output.finished]
        return samples, self._engine.has_unfinished_requests()

    def _sample(self, output: Any) -> Sample:
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        self._stats = replace(
            self._stats,
            responses=self._stats.responses + 1,
            response_tokens=self._stats.response_tokens + len(token_ids),
            prompt_tokens=self._stats.prompt_tokens + len(output.prompt_token_ids),
        )
        return Sample(
            token_ids=token_ids,
            logprobs=[entry[token].logprob for entry, token in zip(completion.logprobs, token_ids, strict=True)],
            versions=tuple(
                VersionSpan(int(span.version), span.end - span.start) for span in completion.weight_versions
            ),
            text=self._engine.get_tokenizer().decode(token_ids, skip_special_tokens=True),
            finished=completion.finish_reason == "stop",
        )

    def _update(self, version: int, path: str) -> None:
        started = time.monotonic()
        engine = self._engine
        engine.sleep(level=0, mode="keep")
        engine.collective_rpc("start_weight_update", timeout=UPDATE_TIMEOUT_S)
        engine.collective_rpc("update_weights", timeout=UPDATE_TIMEOUT_S, kwargs={"update_info": {"path": path}})
        engine.collective_rpc("finish_weight_update", timeout=UPDATE_TIMEOUT_S)
        engine.reset_prefix_cache(reset_running_requests=True)
        engine.set_weight_version(str(version))
        engine.wake_up(tags=["scheduling"])
        self._version = version
        elapsed = time.monotonic() - started
        self._stats = replace(
            self._stats, updates=self._stats.updates + 1, update_seconds=self._stats.update_seconds + elapsed
        )


def _to_memory_file(tensors: Mapping[str, torch.Tensor]) -> int:
    """Descriptor of an anonymous file in memory: workers of this node can map it, and it ends with this process."""
    from safetensors.torch import save

    payload = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    memory = os.memfd_create("anchorage-weights")
    with open(memory, "wb", closefd=False) as file:
        file.write(payload)
    return memory


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
