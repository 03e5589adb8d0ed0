"""Adapter to vLLM, the only file that depends on it besides the workers' ends: `weight_transfer.py` of an update, and
`cache_memory.py` of giving memory back.

All calls are synchronous: requests are added, weights are changed and versions are labelled between two steps, never
during one. It runs in a process of its own (`server.py`), because it would otherwise share one interpreter lock with
the actor's episodes. vLLM is imported when an engine starts, not with this module.

Invariants
- Weights change only by vLLM's weight-update protocol: pause with requests kept, start / update / finish, reset of the
  prefix cache, version label, resume. The layerwise reload in start and finish repacks every linear layer; writing into
  the parameters alone would leave the CPU kernels, which read packed copies, on the old weights without an error.
- The reset also recomputes the cache of running requests: each token is sampled wholly under the version in its span.
- Async scheduling is off: a batch launched before an update would be labelled with the version after it.
- An engine that sleeps keeps its requests and does no step. Only a weight update wakes it: on a GPU it has no weights.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.engine.interface import EngineStats
from actors.engine.messages import Request, Response
from actors.engine.weight_transfer import BACKEND, register_weight_transfer
from services.config.tree import ModelConfig, RolloutConfig
from services.errors import first_line
from services.weights import TransferLost

CPU_BLOCK_TOKENS = 32
CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 8192
"""Most tokens of one step on a GPU, prompts in parts included. vLLM's default for an engine on its own is 2,048: with
prompts of thousands of tokens a step would sample few requests beside one prompt."""
CACHE_MEMORY = "actors.engine.cache_memory.CacheMemory"
MOST_SEQUENCES = CPU_BATCH_TOKENS
"""Most sequences that vLLM runs at the same time, others wait: it requires at least one batch token for each."""
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's CPU attention is compiled for; a test compares them with the installed vLLM."""


def engine_environment() -> dict[str, str]:
    """Environment variables that an engine's process needs before it imports torch and vLLM."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # On a CPU a kernel is created for each batch size: kept without a bound they take 500 MiB more.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64"),
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


class VllmCore:
    """One vLLM engine with continuous batching, for one caller. Not reusable after `stop`.

    Args:
        model: the model and its lengths.
        rollout: resources of the engine.
        seed: of the engine; requests have their own.

    Attributes:
        engine: vLLM's own engine, once started.
        busy: whether requests are unfinished.
        asleep: whether its memory is given back.
    """

    def __init__(self, model: ModelConfig, rollout: RolloutConfig, seed: int = 0) -> None:
        self._model = model
        self._rollout = rollout
        self._seed = seed
        self._stats = EngineStats()
        self.engine: Any = None
        self.busy = False
        self.asleep = False
        self._cpu = False

    @property
    def may_step(self) -> bool:
        """Whether there is something to compute, and memory for it."""
        return self.busy and not self.asleep

    def stats(self) -> EngineStats:
        """Counters, except the number of running requests, which the caller knows."""
        return self._stats

    def start(self) -> None:
        """Load the model, in a process started with `engine_environment`. Raises whatever vLLM raises."""
        import torch._dynamo
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        # It warns about every layer without parameters on every update; missing parameters are an error here anyway.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        register_weight_transfer()
        cpu = self._cpu = current_platform.is_cpu()
        if cpu:
            # Otherwise small functions of its sampler are compiled, which needs a C++ compiler.
            torch._dynamo.config.disable = True
        context = self._model.max_prompt_tokens + self._model.max_response_tokens
        arguments = EngineArgs(
            **self._further(cpu=cpu),
            model=str(self._model.path),
            dtype=self._model.dtype,
            seed=self._seed,
            max_model_len=context,
            max_num_seqs=min(self._rollout.episodes_in_flight, MOST_SEQUENCES),
            tensor_parallel_size=self._rollout.tensor_parallel,
            gpu_memory_utilization=self._rollout.gpu_memory_utilization,
            kv_cache_memory_bytes=self._rollout.kv_cache_mib * 2**20 if cpu else None,
            # On a CPU, chunked prefill of a seeded request crashes vLLM: it rewinds a generator without an offset.
            enable_chunked_prefill=not cpu,
            async_scheduling=False,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            use_tqdm_on_load=False,
            weight_transfer_config={"backend": BACKEND},
            **(self._sleeping(cpu=cpu) if self._rollout.share_gpus == "turns" else {}),
        )
        if cpu:
            _fit_to_cpu(arguments)
        self.engine = LLMEngine.from_engine_args(arguments)
        self.engine.set_weight_version("0")
        backends: list[str] = self.engine.collective_rpc(_attention)
        self._stats = replace(self._stats, attention=backends[0])

    def _sleeping(self, *, cpu: bool) -> dict[str, Any]:
        """Arguments of an engine that can give its memory back."""
        return {"worker_extension_cls": CACHE_MEMORY} if cpu else {"enable_sleep_mode": True}

    def _further(self, *, cpu: bool) -> dict[str, Any]:
        """Arguments that `rollout.engine` may change."""
        context = self._model.max_prompt_tokens + self._model.max_response_tokens
        own = {
            "enforce_eager": cpu,
            "max_num_batched_tokens": max(CPU_BATCH_TOKENS, context) if cpu else GPU_BATCH_TOKENS,
            "enable_prefix_caching": True,
            # Only whole blocks are cached: with the CPU's default of 128 tokens most of a step's prefill is repeated.
            "block_size": CPU_BLOCK_TOKENS if cpu else None,
            "disable_log_stats": True,
        }
        return own | self._rollout.engine

    def add(self, request: Request) -> None:
        """Add a request, to start with the next step.

        Raises:
            ValueError: vLLM refuses it.
        """
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        try:
            params = SamplingParams(
                **_detokenized(request.stop),
                temperature=request.temperature,
                top_p=1.0,
                top_k=0,
                seed=request.seed,
                max_tokens=request.max_tokens,
                logprobs=0,
                flat_logprobs=True,
                skip_clone=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self.engine.add_request(str(request.id), tokens_input(request.prompt_ids), params)
        except Exception as error:
            raise ValueError(f"vLLM refuses the request: {first_line(error)}") from error
        self.busy = True

    def drop(self, request: int) -> None:
        """Drop a request; does nothing if there is none of that id."""
        self.engine.abort_request([str(request)])
        self.busy = self.engine.has_unfinished_requests()

    def step(self) -> list[Response]:
        """Do one step of all running requests; return the responses that it finished."""
        ended = [self._response(output) for output in self.engine.step() if output.finished]
        kv_use = self.engine.engine_core.engine_core.scheduler.get_kv_cache_usage()
        self._stats = replace(self._stats, kv_use=kv_use)
        self.busy = self.engine.has_unfinished_requests()
        return ended

    def _response(self, output: Any) -> Response:
        """Convert a finished output of vLLM and count it."""
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        self._stats = replace(
            self._stats,
            responses=self._stats.responses + 1,
            response_tokens=self._stats.response_tokens + len(token_ids),
            prompt_tokens=self._stats.prompt_tokens + len(output.prompt_token_ids),
            cached_tokens=self._stats.cached_tokens + (output.num_cached_tokens or 0),
        )
        return Response(
            id=int(output.request_id),
            token_ids=token_ids,
            logprobs=completion.logprobs.logprobs,
            versions=[(int(span.version), span.end - span.start) for span in completion.weight_versions],
            finished=completion.finish_reason == "stop",
            stopped_by=completion.stop_reason,
        )

    def receive(self, version: int, init: Mapping[str, Any], update: Mapping[str, Any]) -> None:
        """Join a collective transfer, then load as `load`.

        Args:
            version: policy version of the weights.
            init: from `weight_transfer.joining_facts`.
            update: from `weight_transfer.update_facts`.

        Raises:
            TransferLost: the transfer did not start; nothing has changed.
        """
        try:
            self._call_workers("init_weight_transfer_engine", init_info=dict(init))
        except Exception as error:  # its type is lost between processes if there are several workers
            raise TransferLost(f"the transfer of version {version} did not start: {first_line(error)}") from error
        self.load(version, update)

    def sleep(self) -> None:
        """Give memory back: that of the KV cache, on a GPU that of the weights too. `load` wakes the engine.

        Requests in flight are kept; their keys and values are computed again afterwards. Requests may be added.
        """
        if self._cpu:
            self.engine.sleep(level=0, mode="keep")
            self.engine.reset_prefix_cache(reset_running_requests=True)
            self._call_workers("give_cache_back")
        else:
            self.engine.sleep(level=2, mode="keep")
        self.asleep = True

    def load(self, version: int, update: Mapping[str, Any]) -> None:
        """Replace the weights; requests in flight continue. Wakes an engine that sleeps.

        Example: what becomes of a request that is being sampled.

            step               samples token 4 under version 7
            sleep              scheduling is paused, the request is kept
            start .. finish    the workers load the new weights, layer by layer
            reset              its cached keys and values, computed with the old weights, are dropped
            label, wake_up     the next step computes them again for prompt and tokens 1-4, samples 5 under version 8

        Args:
            version: policy version of the weights.
            update: what `weight_transfer.UpdateInfo` holds.
        """
        started = time.monotonic()
        engine = self.engine
        emptied = self.asleep and not self._cpu
        if emptied:
            engine.wake_up(tags=["weights"])
        elif not self.asleep:
            engine.sleep(level=0, mode="keep")
        self._call_workers("start_weight_update")
        self._call_workers("update_weights", update_info=dict(update))
        self._call_workers("finish_weight_update")
        engine.reset_prefix_cache(reset_running_requests=True)
        engine.set_weight_version(str(version))
        engine.wake_up(tags=["kv_cache" if emptied else "scheduling"])
        self.asleep = False
        elapsed = time.monotonic() - started
        self._stats = replace(
            self._stats, updates=self._stats.updates + 1, update_seconds=self._stats.update_seconds + elapsed
        )

    def stop(self) -> None:
        """Release the model."""
        self.engine.engine_core.shutdown()
        self.engine = None

    def _call_workers(self, method: str, **arguments: object) -> None:
        """Call a method of every worker and wait for all of them."""
        self.engine.collective_rpc(method, kwargs=arguments)


def _attention(worker: Any) -> str:
    """The attention back ends of a worker's layers, by name."""
    groups = getattr(worker.model_runner, "attn_groups", [])
    return ", ".join(dict.fromkeys(group.backend.get_name() for some in groups for group in some))


def _fit_to_cpu(arguments: Any) -> None:
    """Adapt the arguments to what vLLM's CPU backend supports for this model.

    Raises:
        ValueError: it cannot run the model. vLLM itself would fail only at the first request.
    """
    try:
        model = arguments.create_model_config()
    except Exception as error:
        raise ValueError(f"vLLM cannot load this model: {_cause(arguments.model, error)}") from error
    if model.is_hybrid or model.has_inner_state:
        # A recurrent state cannot be cut at a block: caching its prefixes needs chunked prefill, which is off.
        arguments.enable_prefix_caching = False
        arguments.block_size = None
    size = model.get_head_size()
    if not (model.use_mla or model.is_attention_free) and size not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        raise ValueError(f"attention heads of size {size}: vLLM on CPU can do {sizes}; take another model, or a GPU")


def _detokenized(stop: Sequence[str]) -> dict[str, Any]:
    """How vLLM decodes a response: not at all, unless it has to look for `stop`, also in special tokens."""
    return {"stop": list(stop), "detokenize": True, "skip_special_tokens": False} if stop else {"detokenize": False}


def _cause(folder: str, error: Exception) -> str:
    """Why vLLM refuses a model; if it says only that it could not import the model's code, what the import raised."""
    from vllm.model_executor.models.registry import ModelRegistry

    if "inspect" in str(error):
        architectures = json.loads((Path(folder) / "config.json").read_text()).get("architectures") or []
        for architecture in set(architectures) & ModelRegistry.models.keys():
            try:
                ModelRegistry.models[architecture].load_model_cls()
            except Exception as reason:
                return f"{architecture}: {first_line(reason)}"
    return first_line(error)
