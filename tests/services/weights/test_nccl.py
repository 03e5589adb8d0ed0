"""The publisher's end over NCCL. What needs a GPU was written without one: two GPUs, one for each end."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest
import torch

from services.config.tree import BufferConfig, Config, ModelConfig, RolloutConfig
from services.weights import WeightsUnavailable, collective
from services.weights.collective import CollectiveChannel
from services.weights.nccl import NcclSender, _Source
from services.weights.rounds import Epochs, Request
from tests import needs
from tests.actors.tiny import make_model, reference_logprobs, weights_of, write_model


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip(needs.NO_GPU)
    pytest.importorskip("vllm", reason=needs.VLLM)
    group = Epochs("p").open([Request("a", "v", 1)], "127.0.0.1", 1)
    with pytest.raises(WeightsUnavailable, match="needs a GPU"):
        NcclSender().open(group, 1.0)


def test_the_source_describes_what_it_sends() -> None:
    pytest.importorskip("vllm", reason=needs.VLLM)
    source = _Source()
    source.tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
    told = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
    assert told == [("a", torch.float32, (2, 3)), ("b", torch.bfloat16, (4,))]


def test_a_card_that_is_shared_is_refused_before_the_start() -> None:
    with pytest.raises(ValueError, match=r"weights\.channel: nccl cannot connect a card to itself"):
        Config.model_validate({"weights": {"channel": "nccl"}, "rollout": {"share_gpus": True}})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=needs.GPUS)
async def test_an_engine_samples_with_the_weights_that_were_sent(
    redis_url: str, run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine on the first GPU, the publisher on the second."""
    from actors.engine.process import EngineProcess

    models = [make_model(seed, tied=True) for seed in (1, 2)]
    engine = EngineProcess(
        ModelConfig(path=write_model(tmp_path / "model", models[0]), max_prompt_tokens=64, max_response_tokens=32),
        RolloutConfig(episodes_in_flight=4, gpu_memory_utilization=0.2),
    )
    await engine.start()
    monkeypatch.setattr(collective, "sender_of", lambda transport: partial(NcclSender, 1))
    ends = [CollectiveChannel(redis_url, run_name, BufferConfig(), "nccl", 60.0) for _ in range(2)]
    for version, model in enumerate([models[1], models[0]], start=1):
        wanted = ends[0].publish(version, weights_of(model))
        await engine.receive_weights(await asyncio.to_thread(ends[1].receive, wanted))
        prompt = list(b"a prompt")
        sample = await engine.generate(prompt, temperature=1.0, max_tokens=8, seed=0)
        theirs = reference_logprobs(model, prompt, sample.token_ids, 1.0)
        assert max(abs(a - b) for a, b in zip(sample.logprobs, theirs, strict=True)) < 0.05
        assert sample.versions[-1].version == version
    for end in ends:
        end.close()
    await engine.stop()
