"""vLLM against Hugging Face: log-probabilities, weight updates with requests in flight, version spans, seeds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import Qwen2ForCausalLM

from actors.engine.interface import EngineFailed, Sample
from actors.engine.process import EngineProcess
from actors.engine.vllm import CPU_BATCH_TOKENS, CPU_BLOCK_TOKENS
from learner.batching import Row, plan
from learner.rank.disk_names import DiskForm
from learner.rank.lora import adapt
from learner.rank.policy import Policy, inputs, load_policy
from services.config.tree import LoraConfig, ModelConfig, RolloutConfig
from services.errors import ModelUnavailable
from tests.actors.tiny import VOCABULARY, make_model, reference_logprobs, weights_of, write_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEMPERATURE = 0.7
PROMPT = list(
    b"A prompt that is longer than one block of the key-value cache, so that a stale block would be found: " * 2
)


LONG = 160
"""So many requests keep the engine busy for seconds, of which it samples 16 at once: whatever the test does meanwhile,
and however late, meets some in flight."""


@dataclass
class Setup:
    engine: EngineProcess
    folder: Path
    models: list[Qwen2ForCausalLM]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[True, False], ids=["tied", "untied"])
async def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    models = [make_model(seed, tied=request.param) for seed in (1, 2)]
    folder = write_model(tmp_path_factory.mktemp("model"), models[0])
    engine = EngineProcess(
        ModelConfig(path=folder, max_prompt_tokens=256, max_response_tokens=128),
        RolloutConfig(episodes_in_flight=16, kv_cache_mib=32),
    )
    with pytest.MonkeyPatch.context() as patch:
        # A machine without a C++ compiler samples too.
        patch.setenv("CXX", "there-is-none")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        await engine.start()
    yield Setup(engine, folder, models)
    await engine.stop()


async def sample_all(engine: EngineProcess, count: int, tokens: int) -> list[tuple[list[int], Sample]]:
    prompts = [[*PROMPT, number] for number in range(count)]
    samples = await asyncio.gather(
        *(
            engine.generate(prompt, temperature=TEMPERATURE, max_tokens=tokens, seed=number)
            for number, prompt in enumerate(prompts)
        )
    )
    return list(zip(prompts, samples, strict=True))


async def in_flight(engine: EngineProcess, count: int) -> None:
    while engine.stats().running < count:  # noqa: ASYNC110 - the engine tells no one
        await asyncio.sleep(0)


async def another_response(engine: EngineProcess, running: asyncio.Task[object]) -> None:
    """Until a response ends, or all have; those in flight beside it have begun under the present weights."""
    before = engine.stats().responses
    while engine.stats().responses == before and not running.done():  # noqa: ASYNC110 - the engine tells no one
        await asyncio.sleep(0)


def largest_difference(model: Qwen2ForCausalLM, prompt: list[int], sample: Sample) -> float:
    wanted = reference_logprobs(model, prompt, sample.token_ids, TEMPERATURE)
    return max(abs(ours - theirs) for ours, theirs in zip(sample.logprobs, wanted, strict=True))


async def test_logprobs_are_those_of_the_model_before_and_after_updates(setup: Setup) -> None:
    for version, model in enumerate([*setup.models, setup.models[0]]):
        if version:
            await setup.engine.load_weights(version, weights_of(model))
        assert setup.engine.version == version
        for prompt, sample in await sample_all(setup.engine, count=6, tokens=16):
            assert largest_difference(model, prompt, sample) < 1e-4
            assert [span.version for span in sample.versions] == [version]
            assert sum(span.tokens for span in sample.versions) == len(sample.token_ids)
            other = setup.models[1] if model is setup.models[0] else setup.models[0]
            assert largest_difference(other, prompt, sample) > 0.1


async def test_logprobs_are_the_learners_also_with_adapters(setup: Setup) -> None:
    policy = load_policy(setup.folder, "float32", TEMPERATURE)
    await setup.engine.load_weights(7, weights_of(setup.models[0]))
    assert await mean_difference(setup, policy) <= 1e-4

    lora = LoraConfig(rank=4, alpha=8)
    adapters = adapt(policy, lora, DiskForm(policy.lm, setup.folder))
    with torch.no_grad():
        for name, parameter in policy.lm.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    trained = {name: parameter for name, parameter in policy.lm.named_parameters() if parameter.requires_grad}
    assert await mean_difference(setup, policy) > 0.1
    await setup.engine.load_weights(8, adapters.broadcast(trained))
    assert await mean_difference(setup, policy) <= 1e-4
    await setup.engine.load_weights(9, weights_of(setup.models[0]))


async def mean_difference(setup: Setup, policy: Policy) -> float:
    """Between the log-probabilities that vLLM sampled with and the learner's, over all response tokens."""
    rows = [
        Row(np.array([*prompt, *sample.token_ids], np.int32), np.array(sample.logprobs, np.float32), 0.0)
        for prompt, sample in await sample_all(setup.engine, count=8, tokens=24)
    ]
    ((batch,),) = plan(rows, 1, 10_000)
    with torch.no_grad():
        logprob, _ = policy(*inputs(batch, torch.device("cpu")))
    return float((logprob - torch.tensor(batch.behaviour)).abs().mean())


async def test_prompts_share_the_cache_until_the_weights_change(setup: Setup) -> None:
    async def found(version: int | None = None) -> int:
        """Of the next prompt's tokens, those that did not have to be computed."""
        if version is not None:
            await setup.engine.load_weights(version, weights_of(setup.models[0]))
        before = setup.engine.stats().cached_tokens
        await setup.engine.generate(PROMPT, temperature=TEMPERATURE, max_tokens=1, seed=0)
        return setup.engine.stats().cached_tokens - before

    blocks = (len(PROMPT) - 1) // CPU_BLOCK_TOKENS
    assert blocks > 1
    assert [await found(version=9), await found(), await found()] == [
        0,
        blocks * CPU_BLOCK_TOKENS,
        blocks * CPU_BLOCK_TOKENS,
    ]
    assert await found(version=9) == 0


async def test_requests_in_flight_go_on_with_the_new_weights(setup: Setup) -> None:
    policies = {version: setup.models[version % 2] for version in range(10, 16)}
    await setup.engine.load_weights(10, weights_of(policies[10]))
    before = setup.engine.stats()
    running = asyncio.create_task(sample_all(setup.engine, count=LONG, tokens=100))
    for version in range(11, 16):
        await another_response(setup.engine, running)
        await setup.engine.load_weights(version, weights_of(policies[version]))
    spans = 0
    for prompt, sample in await running:
        start = 0
        for span in sample.versions:
            wanted = reference_logprobs(policies[span.version], prompt, sample.token_ids, TEMPERATURE)
            for token in range(start, start + span.tokens):
                assert abs(sample.logprobs[token] - wanted[token]) < 1e-4
            start += span.tokens
        assert start == len(sample.token_ids)
        versions = [span.version for span in sample.versions]
        assert versions == sorted(set(versions))
        spans = max(spans, len(versions))
    assert spans > 1
    assert setup.engine.stats().responses == before.responses + LONG
    assert setup.engine.stats().updates == before.updates + 5
    assert setup.engine.stats().update_seconds > before.update_seconds


async def test_the_use_of_the_cache_is_told(setup: Setup) -> None:
    longest = asyncio.create_task(sample_all(setup.engine, count=LONG, tokens=100))
    await in_flight(setup.engine, 16)
    seen = []
    while not longest.done():
        seen.append(setup.engine.stats().kv_use or 0.0)
        await asyncio.sleep(0)
    assert 0.0 < max(seen) < 1.0
    await longest


async def test_more_prompt_tokens_than_a_batch_holds(setup: Setup) -> None:
    await setup.engine.load_weights(20, weights_of(setup.models[0]))
    prompts = [[number, *PROMPT] for number in range(16)]
    assert sum(map(len, prompts)) > CPU_BATCH_TOKENS
    samples = await asyncio.gather(
        *(setup.engine.generate(p, temperature=TEMPERATURE, max_tokens=4, seed=n) for n, p in enumerate(prompts))
    )
    for prompt, sample in zip(prompts, samples, strict=True):
        assert largest_difference(setup.models[0], prompt, sample) < 1e-4


async def test_a_seed_gives_the_same_response_again(setup: Setup) -> None:
    async def tokens(seed: int) -> list[int]:
        sample = await setup.engine.generate(PROMPT, temperature=TEMPERATURE, max_tokens=16, seed=seed)
        return sample.token_ids

    first, *others = [await tokens(seed) for seed in (2**63 - 5, 2**63 - 5, 6)]
    assert first == others[0]
    assert first != others[1]


async def test_the_end_of_sequence_is_part_of_the_response_but_not_of_its_text(setup: Setup) -> None:
    for _, sample in await sample_all(setup.engine, count=64, tokens=100):
        if sample.finished:
            break
    else:
        pytest.fail("no response ended by itself")
    assert sample.token_ids[-1] == 256
    assert 256 not in sample.token_ids[:-1]
    assert "<end>" not in sample.text


async def test_a_stop_text_ends_the_response_with_the_tokens_that_complete_it(setup: Setup) -> None:
    """Ids, log-probabilities and versions are those of the same response without it, cut behind its first letter."""
    letters = 0
    for prompt, whole in await sample_all(setup.engine, count=24, tokens=48):
        seed = prompt[-1]
        place = next((n for n, token in enumerate(whole.token_ids) if n > 2 and _is_letter(setup, token)), None)
        if place is None:
            continue
        letter = _letter(setup, whole.token_ids[place])
        first = next(n for n, token in enumerate(whole.token_ids) if _letter(setup, token) == letter)
        sample = await setup.engine.generate(
            prompt, temperature=TEMPERATURE, max_tokens=48, seed=seed, stop=["never said", letter]
        )
        assert sample.token_ids == whole.token_ids[: first + 1]
        assert sample.logprobs == pytest.approx(whole.logprobs[: first + 1], abs=1e-4)
        assert sum(span.tokens for span in sample.versions) == first + 1
        assert (sample.finished, sample.stopped_by) == (True, letter)
        assert sample.text.endswith(letter)
        letters += 1
    assert letters > 3


async def test_a_stop_text_cuts_version_spans_and_log_probabilities_alike(setup: Setup) -> None:
    policies = {version: setup.models[version % 2] for version in (30, 31)}
    await setup.engine.load_weights(30, weights_of(policies[30]))
    letters = [chr(number) for number in range(ord("a"), ord("e"))]
    running = asyncio.gather(
        *(
            setup.engine.generate([*PROMPT, n], temperature=TEMPERATURE, max_tokens=100, seed=n, stop=letters)
            for n in range(LONG)
        )
    )
    await in_flight(setup.engine, LONG)
    await asyncio.sleep(0.1)
    await setup.engine.load_weights(31, weights_of(policies[31]))
    stopped = 0
    for number, sample in enumerate(await running):
        assert sum(span.tokens for span in sample.versions) == len(sample.token_ids) == len(sample.logprobs)
        start = 0
        for span in sample.versions:
            prompt = [*PROMPT, number]
            wanted = reference_logprobs(policies[span.version], prompt, sample.token_ids, TEMPERATURE)
            for token in range(start, start + span.tokens):
                assert abs(sample.logprobs[token] - wanted[token]) < 1e-4
            start += span.tokens
        stopped += sample.stopped_by in letters
    assert stopped > 10


def _letter(setup: Setup, token: int) -> str:
    return str(setup.engine._tokenizer.decode([token]))


def _is_letter(setup: Setup, token: int) -> bool:
    text = _letter(setup, token)
    return text.isascii() and text.isalpha() and len(text) == 1


@pytest.mark.parametrize("after_s", [0.0, 0.05])
async def test_cancelling_drops_the_requests(setup: Setup, after_s: float) -> None:
    task = asyncio.create_task(sample_all(setup.engine, count=LONG, tokens=100))
    await in_flight(setup.engine, LONG)
    await asyncio.sleep(after_s)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert setup.engine.stats().running == 0
    await setup.engine.generate(PROMPT, temperature=1.0, max_tokens=2, seed=0)
    assert setup.engine.stats().kv_use == 0


async def test_a_prompt_that_vllm_refuses_fails_alone(setup: Setup) -> None:
    asked = (setup.engine.generate(ids, temperature=1.0, max_tokens=8, seed=0) for ids in (PROMPT, [10**6]))
    sample, refused = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(sample, Sample)
    assert isinstance(refused, ValueError)
    assert "out of vocabulary" in str(refused)


async def test_a_prompt_that_does_not_fit_fails_alone(setup: Setup) -> None:
    with pytest.raises(ValueError, match="384 tokens"):
        await setup.engine.generate([1] * 377, temperature=1.0, max_tokens=8, seed=0)
    with pytest.raises(ValueError, match="0 prompt tokens"):
        await setup.engine.generate([], temperature=1.0, max_tokens=8, seed=0)
    sample = await setup.engine.generate([1] * 376, temperature=1.0, max_tokens=8, seed=0)
    assert len(sample.logprobs) == len(sample.token_ids)
    assert max(sample.token_ids) < VOCABULARY


async def test_weights_that_lack_a_parameter_end_the_engine(setup: Setup) -> None:
    weights = weights_of(setup.models[0])
    del weights["model.norm.weight"]
    running = asyncio.create_task(sample_all(setup.engine, count=LONG, tokens=100))
    await in_flight(setup.engine, LONG)
    with pytest.raises(EngineFailed, match=r"version 12.*model\.norm\.weight"):
        await setup.engine.load_weights(12, weights)
    with pytest.raises(EngineFailed, match="version 12"):
        await running
    with pytest.raises(EngineFailed, match="version 12"):
        await setup.engine.generate(PROMPT, temperature=1.0, max_tokens=1, seed=0)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([], "config.json"),
        (["config.json"], "tokenizer"),
        (["config.json", "tokenizer.json"], "weights"),
    ],
)
async def test_an_incomplete_model_folder_is_named(kept: list[str], message: str, tmp_path: Path) -> None:
    for name in kept:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelUnavailable, match=message):
        await EngineProcess(ModelConfig(path=tmp_path), RolloutConfig()).start()
    with pytest.raises(ModelUnavailable, match="not a folder"):
        await EngineProcess(ModelConfig(path=tmp_path / "missing"), RolloutConfig()).start()
