"""vLLM in its process: start, speed, repeatability, and its log-probabilities beside the learner's.

Invariants
- The gap to the learner is that of the learner's own route (packed lines, the dtype of training). What it may be is
  measured, too: by how far rounding takes the model's own forward pass from float32.
- The same judgement must reject changed weights: on a model where it does not, the gap shows nothing.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.engine.interface import Sample
from actors.engine.process import EngineProcess
from anchorage.checks.engine_parity import change
from benchmarks.gpu_check.models import SIZES, folder_of
from benchmarks.gpu_check.rows import Row, at_least, at_most, holds, measured, skipped
from benchmarks.gpu_check.settings import CARD_NEEDED, Settings, cards
from learner.batching import MicroBatch, plan
from learner.batching import Row as Response
from learner.rank.policy import Policy, Route, inputs, load_policy
from services.config.tree import ModelConfig, RolloutConfig

Floats = NDArray[np.float64]

IN_FLIGHT = 128
TEMPERATURE = 0.8
"""Not 1: a temperature that one side ignores shows."""
ROUNDING = 3.0
"""The gap may be this many times the distance of the model's own pass from float32."""
FLOOR = 1e-3
"""Nats; a smaller mean is always allowed."""
TAIL = 10.0
"""The 99th percentile may be this many times the bound of the mean."""
LEAST_CHANGE = 5.0
"""Changed weights must give at least this many times the bound."""
REPEATED = 0.95
"""Least share of responses that are the same with the same seed: kernels that add in another order may flip a token."""
BUDGET = 8192
OTHER_HEADS = "1.5b"
CACHES = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")


@dataclass(frozen=True, slots=True)
class Load:
    """What is sampled, in tokens.

    Attributes:
        prompt: length of a prompt.
        response: most tokens of a response.
        requests: number of them.
    """

    prompt: int
    response: int
    requests: int


SPEED, GAP, REPEAT = Load(512, 128, 512), Load(256, 128, 64), Load(128, 64, 32)
DRY_SPEED, DRY_GAP, DRY_REPEAT = Load(24, 4, 128), Load(24, 16, 16), Load(24, 8, 8)


class Engine:
    """An engine of a model, and the event loop that it lives in. A context manager.

    Args:
        settings: of the checks.
        folder: of the model.
        tensor_parallel: number of its workers.
    """

    def __init__(self, settings: Settings, folder: Path, tensor_parallel: int = 1) -> None:
        dtype: Any = settings.dtype
        model = ModelConfig(path=folder, dtype=dtype, max_prompt_tokens=512, max_response_tokens=128)
        rollout = RolloutConfig(
            episodes_in_flight=IN_FLIGHT,
            gpu_memory_utilization=0.4,
            kv_cache_mib=32,
            tensor_parallel=tensor_parallel,
        )
        self._vocabulary = vocabulary_of(folder)
        self._runner = asyncio.Runner()
        self.process = EngineProcess(model, rollout)

    def start(self) -> float:
        """Start it; return the seconds."""
        began = time.perf_counter()
        self._runner.run(self.process.start())
        return time.perf_counter() - began

    def sample(self, load: Load, *, first_seed: int = 0, temperature: float = 1.0) -> list[tuple[list[int], Sample]]:
        """Sample responses, at most `IN_FLIGHT` at the same time; return each with its prompt."""
        prompts = made_up_prompts(load, self._vocabulary)
        room = asyncio.Semaphore(IN_FLIGHT)

        async def one(number: int, prompt: list[int]) -> Sample:
            async with room:
                return await self.process.generate(
                    prompt, temperature=temperature, max_tokens=load.response, seed=first_seed + number
                )

        async def all_of_them() -> list[Sample]:
            return await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))

        return list(zip(prompts, self._runner.run(all_of_them()), strict=True))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self.process.stop())
        self._runner.close()


def vocabulary_of(folder: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config().vocab_size)


def made_up_prompts(load: Load, vocabulary: int) -> list[list[int]]:
    """Random prompts, from half of the length on. In large vocabularies ids begin at 1000, after special tokens."""
    random = np.random.default_rng(load.prompt)
    lengths = random.integers(load.prompt // 2, load.prompt + 1, load.requests)
    first = 1000 if vocabulary > 10_000 else 10
    return [random.integers(first, vocabulary, length).tolist() for length in lengths]


def of_model(settings: Settings) -> Iterator[Row]:
    """Start with empty caches and with full ones, speed, repeatability, and the gap to the learner."""
    if not settings.dry and not cards():
        yield skipped("engine", CARD_NEEDED)
        return
    folder = folder_of(settings)
    caches = settings.folder / "caches"
    os.environ.update({name: str(caches / name.lower()) for name in CACHES})
    if settings.dry:
        yield skipped("cold start, s", "on a CPU nothing is compiled that a second start would find")
    else:
        with Engine(settings, folder) as engine:
            yield measured("cold start, s", engine.start())
    with Engine(settings, folder) as engine:
        yield measured("warm start, s", engine.start())
        attention = engine.process.stats().attention
        yield holds("attention back end", attention, bool(attention), "the engine names it")
        yield from speed(engine, DRY_SPEED if settings.dry else SPEED)
        yield from repeatability(engine, DRY_REPEAT if settings.dry else REPEAT)
        samples = engine.sample(DRY_GAP if settings.dry else GAP, temperature=TEMPERATURE)
    yield from gap(settings, folder, samples)


def of_other_heads(settings: Settings) -> Iterator[Row]:
    """The gap to the learner for a model with heads of 128."""
    if not settings.dry and not cards():
        yield skipped("heads of 128", CARD_NEEDED)
        return
    if settings.dry or settings.model not in SIZES:
        yield skipped(
            "heads of 128", "one engine exercises the check" if settings.dry else "a model is given (--model)"
        )
        return
    folder = folder_of(settings, OTHER_HEADS)
    with Engine(settings, folder) as engine:
        engine.start()
        samples = engine.sample(DRY_GAP if settings.dry else GAP, temperature=TEMPERATURE)
    for row in gap(settings, folder, samples):
        yield Row(f"heads of 128: {row.name}", row.value, row.verdict, row.reason)


def speed(engine: Engine, load: Load) -> Iterator[Row]:
    engine.sample(Load(load.prompt // 2, load.response, IN_FLIGHT))  # kernels for these sizes of batches
    began = time.perf_counter()
    samples = engine.sample(load, first_seed=10_000)
    seconds = time.perf_counter() - began
    sampled = sum(len(sample.token_ids) for _, sample in samples)
    yield measured(f"sampled tokens/s, {IN_FLIGHT} in flight", sampled / seconds)
    yield measured("prompt tokens/s beside them", sum(len(prompt) for prompt, _ in samples) / seconds)


def repeatability(engine: Engine, load: Load) -> Iterator[Row]:
    """The same requests twice, with the same seeds and with others."""
    first, second = (engine.sample(load, first_seed=7) for _ in range(2))
    yield from judge_repeated(first, second, engine.sample(load, first_seed=100_000))


def judge_repeated(
    first: Sequence[tuple[list[int], Sample]],
    second: Sequence[tuple[list[int], Sample]],
    other: Sequence[tuple[list[int], Sample]],
) -> Iterator[Row]:
    """Compare responses of the same seeds, and of other seeds, which must differ: else the seed has no effect."""
    yield at_least("same seed, same tokens, share", _same(first, second), REPEATED)
    yield at_most("other seed, same tokens, share", _same(first, other), 1 - REPEATED)


def _same(one: Sequence[tuple[list[int], Sample]], other: Sequence[tuple[list[int], Sample]]) -> float:
    return float(np.mean([a.token_ids == b.token_ids for (_, a), (_, b) in zip(one, other, strict=True)]))


def gap(settings: Settings, folder: Path, samples: Sequence[tuple[list[int], Sample]]) -> Iterator[Row]:
    """The gap between what was sampled and the learner, and that of changed weights."""
    ((batches),) = plan([response_of(prompt, sample) for prompt, sample in samples], 1, BUDGET)
    sampled = np.concatenate([batch.behaviour for batch in batches]).astype(np.float64)
    learner = load_policy(folder, settings.dtype, TEMPERATURE).to(settings.device)
    scored = scores(learner, batches)
    learner.route = Route(packed=False, halves=False)
    own = scores(learner, batches)
    exact = scores(load_policy(folder, "float32", TEMPERATURE, route=learner.route).to(settings.device), batches)
    bound = bound_of(own, exact)
    yield measured("rounding of the model's own pass, mean, nats", float(np.abs(own - exact).mean()))
    yield from judge_gap("gap to the learner", scored - sampled, bound)
    yield from judge_gap("gap to float32", exact - sampled, bound)
    with torch.no_grad():
        change(learner.lm)
    changed = float(np.abs(scores(learner, batches) - sampled).mean())
    yield at_least("gap of changed weights, mean, nats", changed, LEAST_CHANGE * bound)


def response_of(prompt: Sequence[int], sample: Sample) -> Response:
    """A sampled response as the learner's row."""
    return Response(np.array([*prompt, *sample.token_ids], np.int32), np.array(sample.logprobs, np.float32), 0.0)


@torch.no_grad()
def scores(policy: Policy, batches: Sequence[MicroBatch]) -> Floats:
    """Log-probabilities of the batches' response tokens, one batch after the other."""
    device = next(policy.parameters()).device
    parts = [policy(*inputs(batch, device))[0].double().cpu().numpy() for batch in batches]
    return np.concatenate(parts)


def bound_of(own: Floats, exact: Floats) -> float:
    """Bound of the gap's mean in nats, from log-probabilities of the model's own pass in two precisions."""
    return max(FLOOR, ROUNDING * float(np.abs(own - exact).mean()))


def judge_gap(name: str, difference: Floats, bound: float) -> Iterator[Row]:
    """Judge log π − log μ [T] of sampled tokens, in nats.

    k3 estimates KL(μ ‖ π) from samples of μ: e^d − 1 − d (Schulman, "Approximating KL divergence", 2020).
    """
    off = np.abs(difference)
    off = np.where(np.isfinite(off), off, np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        k3 = float(np.mean(np.expm1(difference) - difference))
    yield at_most(f"{name}, mean, nats", float(off.mean()), bound)
    yield at_most(f"{name}, p99, nats", float(np.quantile(off, 0.99)), TAIL * bound)
    yield at_most(f"{name}, k3, nats", k3, bound)


CHECKS = (of_model, of_other_heads)
