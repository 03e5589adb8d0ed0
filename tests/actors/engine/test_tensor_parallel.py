"""Two tensor-parallel workers, processes of their own, against Hugging Face, before and after a weight update."""

from __future__ import annotations

from pathlib import Path

from actors.engine.process import EngineProcess
from services.config.tree import ModelConfig, RolloutConfig
from tests.actors.tiny import make_model, reference_logprobs, weights_of, write_model

PROMPT = list(b"A prompt for two workers.")


async def test_two_workers_play_and_load_weights_as_one(tmp_path: Path) -> None:
    models = [make_model(seed, tied=True) for seed in (1, 2)]
    engine = EngineProcess(
        ModelConfig(path=write_model(tmp_path, models[0]), max_prompt_tokens=64, max_response_tokens=32),
        RolloutConfig(episodes_in_flight=4, kv_cache_mib=32, tensor_parallel=2),
    )
    await engine.start()
    try:
        for version, model in enumerate([*models, models[0]]):
            if version:
                await engine.load_weights(version, weights_of(model))
            sample = await engine.generate(PROMPT, temperature=1.0, max_tokens=16, seed=version)
            wanted = reference_logprobs(model, PROMPT, sample.token_ids, 1.0)
            assert max(abs(a - b) for a, b in zip(sample.logprobs, wanted, strict=True)) < 1e-4
            assert [span.version for span in sample.versions] == [version]
    finally:
        await engine.stop()
