"""An engine's process: how it ends, and what its actor then hears."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio

from actors.engine.interface import EngineFailed, Sample
from actors.engine.process import EngineProcess
from services.config.tree import ModelConfig, RolloutConfig
from services.process import ReservedPort
from services.weights import TransferLost, WeightVersion
from services.weights.collective import Incoming
from services.weights.coordination import TensorMeta
from services.weights.rounds import Membership
from tests.actors.tiny import make_model, weights_of, write_model
from tests.waiting import until

PROMPT = list(b"A prompt.")
ROLLOUT = RolloutConfig(episodes_in_flight=4, kv_cache_mib=32)
MODEL = make_model(1, tied=True)


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return ModelConfig(path=write_model(tmp_path / "model", MODEL), max_prompt_tokens=64, max_response_tokens=400)


@pytest_asyncio.fixture
async def engine(model: ModelConfig) -> AsyncIterator[EngineProcess]:
    engine = EngineProcess(model, ROLLOUT)
    await engine.start()
    yield engine
    await engine.stop()


def process_of(engine: EngineProcess) -> psutil.Process:
    assert engine.pid is not None
    return psutil.Process(engine.pid)


async def begun(engine: EngineProcess) -> asyncio.Future[object]:
    """So many requests that they go on for seconds, however late the test comes back to them."""
    asked = (engine.generate(PROMPT, temperature=1.0, max_tokens=400, seed=seed) for seed in range(100))
    task: asyncio.Future[object] = asyncio.gather(*asked)  # type: ignore[assignment]
    while not engine.stats().kv_use:  # noqa: ASYNC110 - the engine tells no one
        await asyncio.sleep(0.01)
    return task


async def test_a_killed_engine_fails_what_it_was_asked_and_will_be(engine: EngineProcess) -> None:
    task, process = await begun(engine), process_of(engine)
    process.kill()
    with pytest.raises(EngineFailed, match=r"process ended \(code -9\)"):
        await task
    with pytest.raises(EngineFailed, match="process ended"):
        await engine.generate(PROMPT, temperature=1.0, max_tokens=1, seed=0)
    with pytest.raises(EngineFailed, match="process ended"):
        await engine.load_weights(1, weights_of(MODEL))
    assert not process.is_running()


async def test_an_engine_that_hangs_in_an_update_never_samples_again(engine: EngineProcess) -> None:
    task, process = await begun(engine), process_of(engine)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await engine.load_weights(3, weights_of(MODEL))
    with pytest.raises(EngineFailed, match="version 3"):
        await task
    with pytest.raises(EngineFailed, match="version 3"):
        await engine.generate(PROMPT, temperature=1.0, max_tokens=1, seed=0)
    await engine.stop()
    assert not process.is_running()


async def test_answers_that_cannot_be_read_fail_their_callers(
    engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object, **__: object) -> str:
        raise IndexError("no such token")

    monkeypatch.setattr(engine._tokenizer, "decode", decode)
    with pytest.raises(EngineFailed, match=r"invalid message from the engine process: no such token"):
        async with asyncio.timeout(20):
            await engine.generate(PROMPT, temperature=1.0, max_tokens=1, seed=0)


async def test_a_transfer_that_does_not_begin_changes_nothing(engine: EngineProcess) -> None:
    """A round's membership reaches the worker, which checks in where no publisher is."""
    with ReservedPort("127.0.0.1") as port:
        membership = Membership("gloo", "p-1", "127.0.0.1", port.number, port.number, 0.5, 1, 2)
        incoming = Incoming(WeightVersion(1, 0, "", "v"), (TensorMeta("weight", "float32", (1,)),), membership, 30.0)
        with pytest.raises(TransferLost, match=r"version 1 did not start: .*not all 2 ranks checked in within 0.5 s"):
            await engine.receive_weights(incoming)
    assert engine.version == 0
    sample = await engine.generate(PROMPT, temperature=1.0, max_tokens=1, seed=0)
    assert [span.version for span in sample.versions] == [0]


async def test_a_stopped_engine_refuses(engine: EngineProcess) -> None:
    task, process = await begun(engine), process_of(engine)
    await engine.stop()
    with pytest.raises(EngineFailed, match="stopped"):
        await task
    with pytest.raises(EngineFailed, match="stopped"):
        await engine.generate(PROMPT, temperature=1.0, max_tokens=1, seed=0)
    assert not process.is_running()
    await engine.stop()


async def test_an_engine_can_be_stopped_while_it_starts(model: ModelConfig) -> None:
    engine = EngineProcess(model, ROLLOUT)
    starting = asyncio.create_task(engine.start())
    while not engine._calls:  # noqa: ASYNC110 - it tells no one
        await asyncio.sleep(0)
    process = process_of(engine)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not process.is_running()


async def test_a_start_cancelled_before_its_link_opens_leaves_no_process(model: ModelConfig) -> None:
    engine = EngineProcess(model, ROLLOUT)
    starting = asyncio.create_task(engine.start())
    while engine.pid is None:  # noqa: ASYNC110 - it tells no one
        await asyncio.sleep(0)
    assert engine._writer is None
    process = process_of(engine)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not process.is_running()


async def test_an_engine_stopped_before_its_link_opens_fails_its_start(model: ModelConfig) -> None:
    engine = EngineProcess(model, ROLLOUT)
    starting = asyncio.create_task(engine.start())
    while engine.pid is None:  # noqa: ASYNC110 - it tells no one
        await asyncio.sleep(0)
    process = process_of(engine)
    await engine.stop()
    with pytest.raises(EngineFailed, match="cannot start"):
        await starting
    assert not process.is_running()


async def test_what_vllm_cannot_load_is_told_in_one_line(model: ModelConfig) -> None:
    (model.path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "qwen2"}')
    engine = EngineProcess(model, ROLLOUT)
    with pytest.raises(EngineFailed, match="vLLM cannot start with") as failure:
        await engine.start()
    assert "\n" not in str(failure.value)
    with pytest.raises(EngineFailed):
        await engine.generate(PROMPT, temperature=1.0, max_tokens=1, seed=0)


PARENT = """
import asyncio, sys
from pathlib import Path
from actors.engine.process import EngineProcess
from services.config.tree import ModelConfig, RolloutConfig

async def main():
    model = ModelConfig(path=Path(sys.argv[1]), max_prompt_tokens=64, max_response_tokens=64)
    engine = EngineProcess(model, RolloutConfig(kv_cache_mib=32))
    starting = asyncio.create_task(engine.start())
    while engine.pid is None:
        await asyncio.sleep(0.01)
    print(engine.pid, flush=True)
    if sys.argv[2] == "started":
        await starting
        print("started", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["starting", "started"])
def test_an_engine_does_not_outlive_a_killed_actor(model: ModelConfig, when: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(model.path), when], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        try:
            engine = psutil.Process(int(parent.stdout.readline()))
            if when == "started":
                assert b"started\n" in iter(parent.stdout.readline, b"")
        finally:
            parent.kill()
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 30)


CACHE_MIB = 128


async def test_an_engine_that_sleeps_gives_its_cache_back_and_samples_the_same_afterwards(model: ModelConfig) -> None:
    """Requests in flight wait for the weights that wake it; their tokens are labelled with both versions."""
    engine = EngineProcess(model, RolloutConfig(episodes_in_flight=4, kv_cache_mib=CACHE_MIB, share_gpus="turns"))

    async def sample(seed: int, tokens: int = 40) -> Sample:
        return await engine.generate(PROMPT, temperature=1.0, max_tokens=tokens, seed=seed)

    await engine.start()
    try:
        before = [await sample(seed) for seed in range(3)]
        in_flight = [asyncio.create_task(sample(seed, tokens=400)) for seed in range(8)]
        while not engine.stats().kv_use:  # noqa: ASYNC110 - the engine tells no one
            await asyncio.sleep(0.01)
        process = process_of(engine)
        resident = process.memory_info().rss
        await engine.sleep()
        assert resident - process.memory_info().rss >= CACHE_MIB * 2**20
        sampled, busy = engine.stats().response_tokens, process.cpu_times().user
        later = asyncio.create_task(sample(0))
        await asyncio.sleep(0.5)
        assert process.cpu_times().user - busy < 0.25  # it waits for a message
        assert not later.done()
        assert engine.stats().response_tokens == sampled
        await engine.load_weights(5, weights_of(MODEL))
        after = [await later, *[await sample(seed) for seed in range(1, 3)]]
        for ours, theirs in zip(after, before, strict=True):
            assert ours.token_ids == theirs.token_ids
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
        spans = {tuple(span.version for span in (await each).versions) for each in in_flight}
        assert (0, 5) in spans
        assert spans <= {(0,), (0, 5), (5,)}
    finally:
        await engine.stop()
