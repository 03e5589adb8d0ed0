"""Whether vLLM samples with the log-probabilities that the learner computes: before, and after weights were published.

It goes through the engine's own process and the update path of a rollout actor. The same weights show what an update
breaks; changed ones show what an update leaves behind, such as packed copies of the weights before.

Invariants
- Every weight is changed by a share of its own spread, so that any that stays behind shows.
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
"""Standard deviation of the change, as a share of the tensor's own."""
LEAST_SPREAD = 0.02
STAGES = ("at the start", "after publishing the same weights", "after publishing changed weights")
ADAPTED = "after publishing adapters"


@dataclass(frozen=True, slots=True)
class Gap:
    """Between the sampler's and the learner's log-probabilities of the same tokens, in nats.

    Attributes:
        stage: when. largest / mean: absolute differences; NaN where nothing could be sampled.
        failure: why not, one line.
    """

    stage: str
    largest: float = math.nan
    mean: float = math.nan
    failure: str = ""

    def within(self, largest: float, mean: float) -> bool:
        """Whether it is at most that."""
        return not self.failure and self.largest <= largest and self.mean <= mean


def measure_engine(folder: Path, dtype: str, context: int, lora: LoraConfig | None = None) -> list[Gap]:
    """The gap at each of `STAGES` and, with `lora`, after adapters; the stages after a failure are left out.

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
        """Adapters of the folder's own weights, to which the policy goes back."""
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
    """The stages that follow make no sense."""


def compare(policy: Policy, stage: str, samples: list[tuple[list[int], Sample]]) -> Gap:
    """Score what was sampled, each pair of prompt and sample alone."""
    import numpy as np

    from anchorage.checks.local_scorer import gap
    from learner.batching import Row

    rows = [
        Row(np.array([*prompt, *sample.token_ids], np.int32), np.array(sample.logprobs, np.float32), 0.0)
        for prompt, sample in samples
    ]
    return Gap(stage, *gap(policy, rows))


def change(lm: Any, seed: int = 7) -> None:
    """Add noise to every weight, as large as `CHANGE` of its own spread."""
    import torch

    from learner.rank.disk_names import weights_of

    generator = torch.Generator().manual_seed(seed)
    for tensor in weights_of(lm).values():
        if tensor.is_floating_point():
            spread = float(tensor.float().std()) if tensor.numel() > 1 else 0.0
            noise = torch.randn(tensor.shape, generator=generator) * CHANGE * max(spread, LEAST_SPREAD)
            tensor.add_(noise.to(tensor.device, tensor.dtype))


def _prompts(policy: Policy, longest: int) -> list[list[int]]:
    """Random ordinary tokens, from a few to as many as a prompt may have."""
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
