"""Checks that vLLM samples with the log-probabilities that the learner computes, before and after weight updates.

It uses the engine's own process and the update path of a rollout actor. Publishing the same weights shows what an
update breaks; publishing changed ones shows what it leaves behind, such as packed copies of the old weights.

Invariants
- Every weight is changed, in proportion to its own spread, so that one that is left behind shows.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorage.runs import event_loop
from services.config.tree import LoraConfig, ModelConfig, RolloutConfig
from services.errors import AnchorageError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from actors.engine.interface import InferenceEngine, Sample
    from learner.rank.policy import Policy

TEMPERATURE = 0.8
PROMPTS = 6
RESPONSE_TOKENS = 24
CHANGE = 0.2
"""Standard deviation of the change, as a fraction of the tensor's own."""
LEAST_SPREAD = 0.02
STAGES = ("at the start", "after publishing the same weights", "after publishing changed weights")
ADAPTED = "after publishing adapters"


@dataclass(frozen=True, slots=True)
class Gap:
    """The difference between the sampler's and the learner's log-probabilities of the same tokens, in nats.

    Attributes:
        stage: when it was measured.
        largest / mean: absolute differences; NaN where nothing could be sampled.
        failure: why nothing could be sampled, one line.
    """

    stage: str
    largest: float = math.nan
    mean: float = math.nan
    failure: str = ""

    def within(self, largest: float, mean: float) -> bool:
        """Return whether both differences are at most these."""
        return not self.failure and self.largest <= largest and self.mean <= mean


def measure_engine(folder: Path, dtype: str, context: int, lora: LoraConfig | None = None) -> list[Gap]:
    """Measure the gap at each of `STAGES` and, with `lora`, after adapters. A failure skips the stages after it.

    Raises:
        ModelUnavailable: the learner cannot load the model.
    """
    from actors.engine.process import EngineProcess
    from learner.rank.policy import Route, load_policy

    response = min(RESPONSE_TOKENS, context // 2)
    model = ModelConfig(
        path=folder,
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
        max_prompt_tokens=context - response,
        max_response_tokens=response,
    )
    own = Route(packed=False, halves=False)
    policy = load_policy(folder, dtype, TEMPERATURE, route=own)
    engine = EngineProcess(model, RolloutConfig(episodes_in_flight=PROMPTS, kv_cache_mib=64))
    return event_loop.run(_Measurement(engine, policy, model).run(lora))


class _Measurement:
    def __init__(self, engine: InferenceEngine, policy: Policy, model: ModelConfig) -> None:
        from learner.rank.disk_names import DiskForm

        self._engine = engine
        self._policy = policy
        self._model = model
        self._disk = DiskForm(policy.lm, model.path)
        self._gaps: list[Gap] = []

    async def run(self, lora: LoraConfig | None) -> list[Gap]:
        try:
            await self._stage(STAGES[0], self._engine.start)
            await self._stage(STAGES[1], self._publish)
            await self._stage(STAGES[2], self._publish_changed)
            if lora is not None:
                await self._stage(ADAPTED, lambda: self._publish_adapters(lora))
        except _Failed:
            pass
        finally:
            await self._engine.stop()
        return self._gaps

    async def _stage(self, name: str, act: Any) -> None:
        try:
            await act()
            self._gaps.append(await self._gap(name))
        except (AnchorageError, ValueError) as error:
            self._gaps.append(Gap(name, failure=first_line(error)))
            raise _Failed from error

    async def _gap(self, stage: str) -> Gap:
        prompts = _prompts(self._policy, self._model.max_prompt_tokens)
        samples = await asyncio.gather(
            *(
                self._engine.generate(
                    prompt, temperature=TEMPERATURE, max_tokens=self._model.max_response_tokens, seed=number
                )
                for number, prompt in enumerate(prompts)
            )
        )
        return compare(self._policy, stage, list(zip(prompts, samples, strict=True)))

    async def _publish(self) -> None:
        from learner.rank.disk_names import weights_of

        await self._load(self._disk.published(weights_of(self._policy.lm)))

    async def _publish_changed(self) -> None:
        change(self._policy.lm)
        await self._publish()

    async def _publish_adapters(self, lora: LoraConfig) -> None:
        """Load the folder's own weights again, and publish adapters of them."""
        import torch

        from learner.rank.lora import adapt
        from learner.rank.policy import Route, load_policy

        own = Route(packed=False, halves=False)
        self._policy = load_policy(self._model.path, self._model.dtype, TEMPERATURE, route=own)
        adapters = adapt(self._policy, lora, self._disk)
        trained = {name: tensor for name, tensor in self._policy.lm.named_parameters() if tensor.requires_grad}
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in trained.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        await self._load(adapters.broadcast({name: tensor.detach() for name, tensor in trained.items()}))

    async def _load(self, tensors: Mapping[str, Tensor]) -> None:
        await self._engine.load_weights(self._engine.version + 1, tensors)


class _Failed(Exception):
    """A stage failed, so the following ones are skipped."""


def compare(policy: Policy, stage: str, samples: list[tuple[list[int], Sample]]) -> Gap:
    """Return the gap of what was sampled, each pair of prompt and sample scored alone."""
    import numpy as np

    from anchorage.checks.local_scorer import gap
    from learner.batching import Row

    rows = [
        Row(np.array([*prompt, *sample.token_ids], np.int32), np.array(sample.logprobs, np.float32), 0.0)
        for prompt, sample in samples
    ]
    return Gap(stage, *gap(policy, rows))


def change(lm: Any, seed: int = 7) -> None:
    """Add noise to every weight, with `CHANGE` times the standard deviation of its tensor."""
    import torch

    from learner.rank.disk_names import weights_of

    generator = torch.Generator().manual_seed(seed)
    for tensor in weights_of(lm).values():
        if tensor.is_floating_point():
            spread = float(tensor.float().std()) if tensor.numel() > 1 else 0.0
            noise = torch.randn(tensor.shape, generator=generator) * CHANGE * max(spread, LEAST_SPREAD)
            tensor.add_(noise.to(tensor.device, tensor.dtype))


def _prompts(policy: Policy, longest: int) -> list[list[int]]:
    """Return prompts of random ordinary tokens, from a few tokens to `longest`."""
    import torch

    config = policy.lm.config
    known = {**config.get_text_config().to_dict(), **config.to_dict()}
    special = {value for name, value in known.items() if "token" in name and isinstance(value, int)}
    rows = policy.lm.get_input_embeddings().weight.shape[0]
    ordinary = [token for token in range(min(rows, config.get_text_config().vocab_size)) if token not in special]
    generator = torch.Generator().manual_seed(3)
    lengths = [max(2, round(longest * (number + 1) / PROMPTS)) for number in range(PROMPTS)]
    picks = [torch.randint(len(ordinary), (length,), generator=generator).tolist() for length in lengths]
    return [[ordinary[pick] for pick in chosen] for chosen in picks]
