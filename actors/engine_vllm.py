"""The adapter to vLLM: the only file that knows it, but for `weight_transfer.py`, the workers' end of an update.

The engine core runs in this process and is stepped by one worker thread, which is the only one that ever touches it:
requests are added, weights are changed and versions are labelled between two steps, never during one. A step begins
with the requests that came during the last one and queues the next one behind what else was asked for, so that no step
waits for the event loop, which leaves requests in a queue and goes on. (`AsyncLLM` needs a core in a process of its
own.) vLLM is imported when an engine starts, not with this module.

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
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from actors.engine import EngineFailed, EngineStats, InferenceEngine, Sample
from actors.weight_transfer import BACKEND, init_facts, register_weight_transfer, update_facts
from services.config.tree import ModelConfig, RolloutConfig
from services.model_folder import check_model_folder, read_weights
from services.schemas import VersionSpan
from services.weights import TransferLost
from services.weights.adapter import is_adapter, merged

if TYPE_CHECKING:
    import torch

    from services.weights.collective import Incoming

logger = logging.getLogger(__name__)

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
        # On a CPU a kernel is made for each number of tokens in a batch: kept without bound they take 500 MiB more.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64"),
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


class _Request(NamedTuple):
    id: str
    prompt_ids: list[int]
    temperature: float
    max_tokens: int
    seed: int


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
        self._queue: deque[_Request] = deque()
        self._stepping = False
        self._step_lock = Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm")

    @property
    def version(self) -> int:
        return self._version

    def stats(self) -> EngineStats:
        return replace(self._stats, running=len(self._waiting))

    async def start(self) -> None:
        check_model_folder(self._model.path)
        self._loop = asyncio.get_running_loop()
        try:
            await self._call(self._create)
        except Exception as error:
            logger.exception("vLLM cannot start")
            raise EngineFailed(f"vLLM cannot start with {self._model.path}: {_line(error)}") from error
        self._failure = None

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
            self._queue.append(_Request(request, list(prompt_ids), temperature, max_tokens, seed))
            self._begin_stepping()
            return await future
        except asyncio.CancelledError:
            if self._failure is None:
                self._thread.submit(self._abort, request)
            raise
        finally:
            del self._waiting[request]

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            memory = await asyncio.to_thread(_to_memory_file, await asyncio.to_thread(self._whole, tensors))
            try:
                await self._call(self._update, version, {"path": f"/proc/{os.getpid()}/fd/{memory}"})
            finally:
                os.close(memory)
        except Exception as error:
            raise self._cannot_load(version, error) from error

    async def receive_weights(self, incoming: Incoming) -> None:
        if self._failure is not None:
            raise self._failure
        version = incoming.version.version
        try:
            await self._call(self._receive, version, init_facts(incoming), update_facts(incoming))
        except TransferLost:
            raise
        except Exception as error:
            raise self._cannot_load(version, error) from error

    def _cannot_load(self, version: int, error: Exception) -> EngineFailed:
        logger.exception("vLLM cannot load version %d", version)
        failure = EngineFailed(f"vLLM cannot load version {version}: {_line(error)}")
        self._fail(str(failure))
        return failure

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
            await self._call(self._shut_down)
        self._thread.shutdown(wait=False)

    async def _call(self, function: Any, *args: Any) -> Any:
        """Run between two steps, on the engine's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _deliver(self, samples: list[tuple[str, Sample]]) -> None:
        for request, sample in samples:
            future = self._waiting.get(request)
            if future is not None and not future.done():
                future.set_result(sample)

    def _refuse(self, request: str, error: ValueError) -> None:
        future = self._waiting.get(request)
        if future is not None and not future.done():
            future.set_exception(error)

    def _fail(self, reason: str) -> None:
        self._failure = EngineFailed(reason)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EngineFailed(reason))

    def _begin_stepping(self) -> None:
        with self._step_lock:
            if not self._stepping:
                self._stepping = True
                self._thread.submit(self._step)

    # Everything below runs on the engine's thread.

    def _create(self) -> None:
        os.environ.update(engine_environment())
        import torch._dynamo
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        # It warns of every layer without parameters on every update; missing parameters are an error here anyway.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        register_weight_transfer()
        cpu = current_platform.is_cpu()
        if cpu:
            # Small functions of its sampler would be compiled, for which the machine needs a C++ compiler.
            torch._dynamo.config.disable = True
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

    def _add_queued(self) -> None:
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        while self._queue:
            request = self._queue.popleft()
            params = SamplingParams(
                temperature=request.temperature,
                top_p=1.0,
                top_k=0,
                seed=request.seed,
                max_tokens=request.max_tokens,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            try:
                self._engine.add_request(request.id, tokens_input(request.prompt_ids), params)
            except Exception as error:
                self._tell(self._refuse, request.id, ValueError(f"vLLM refuses the prompt: {_line(error)}"))

    def _abort(self, request: str) -> None:
        self._add_queued()  # it may still be among them
        self._engine.abort_request([request])

    def _step(self) -> None:
        if self._engine is None:
            return
        try:
            self._add_queued()
            samples = [(output.request_id, self._sample(output)) for output in self._engine.step() if output.finished]
            kv_use = self._engine.engine_core.engine_core.scheduler.get_kv_cache_usage()
            unfinished = self._engine.has_unfinished_requests()
        except Exception as error:
            logger.exception("vLLM stopped working")
            self._tell(self._fail, f"vLLM stopped working: {_line(error)}")
            return
        self._stats = replace(self._stats, kv_use=kv_use)
        if samples:
            self._tell(self._deliver, samples)
        with self._step_lock:
            self._stepping = unfinished or bool(self._queue)
            if self._stepping:
                self._thread.submit(self._step)

    def _tell(self, function: Callable[..., None], *args: object) -> None:
        """Have the event loop call it."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, *args)

    def _shut_down(self) -> None:
        self._engine.engine_core.shutdown()
        self._engine = None

    def _sample(self, output: Any) -> Sample:
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        self._stats = replace(
            self._stats,
            responses=self._stats.responses + 1,
            response_tokens=self._stats.response_tokens + len(token_ids),
            prompt_tokens=self._stats.prompt_tokens + len(output.prompt_token_ids),
            cached_tokens=self._stats.cached_tokens + (output.num_cached_tokens or 0),
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

    def _receive(self, version: int, init: Mapping[str, Any], update: Mapping[str, Any]) -> None:
        try:
            self._ask_workers("init_weight_transfer_engine", init_info=dict(init))
        except Exception as error:  # it has crossed a process where there are several workers
            raise TransferLost(f"the transfer of version {version} did not begin: {_line(error)}") from error
        self._update(version, update)

    def _update(self, version: int, update: Mapping[str, Any]) -> None:
        started = time.monotonic()
        engine = self._engine
        engine.sleep(level=0, mode="keep")
        self._ask_workers("start_weight_update")
        self._ask_workers("update_weights", update_info=dict(update))
        self._ask_workers("finish_weight_update")
        engine.reset_prefix_cache(reset_running_requests=True)
        engine.set_weight_version(str(version))
        engine.wake_up(tags=["scheduling"])
        self._version = version
        elapsed = time.monotonic() - started
        self._stats = replace(
            self._stats, updates=self._stats.updates + 1, update_seconds=self._stats.update_seconds + elapsed
        )

    def _ask_workers(self, method: str, **arguments: object) -> None:
        self._engine.collective_rpc(method, timeout=UPDATE_TIMEOUT_S, kwargs=arguments)


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
