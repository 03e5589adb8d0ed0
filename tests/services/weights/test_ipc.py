"""Weights that stay on the card. CUDA's handles need a GPU; all else of the path is run in host memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from services.config.tree import BufferConfig, Config, ModelConfig, RolloutConfig
from services.process import ReservedPort
from services.weights import WeightsUnavailable, ipc
from services.weights.collective import CollectiveChannel
from services.weights.ipc import CardMemory, CardPool, IpcReceiver, IpcSender, views
from services.weights.payload import Layout, fill
from services.weights.rounds import Epochs, Membership, Request
from tests import needs
from tests.actors.tiny import make_model, reference_logprobs, weights_of, write_model

TENSORS = {"half": torch.arange(3).to(torch.bfloat16), "whole": torch.arange(6.0).reshape(2, 3)}


def filled(memory: CardMemory) -> CardMemory:
    fill(memory.places(Layout.of(TENSORS)), TENSORS.items())
    return memory


def test_a_snapshot_lies_in_one_piece_and_is_found_again_by_the_forms_alone() -> None:
    memory = filled(CardMemory(Layout.of(TENSORS).nbytes, "cpu"))
    tensors = memory.tensors()
    assert list(tensors) == ["whole", "half"]
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    first = tensors["whole"]
    flat = torch.empty(0, dtype=torch.uint8).set_(first.untyped_storage())
    forms = {name: tensor.to("meta") for name, tensor in tensors.items()}
    found = dict(views(flat, first.storage_offset() * 4, forms))
    assert all(found[name].data_ptr() == tensors[name].data_ptr() for name in TENSORS)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_a_snapshot_that_is_kept_is_not_written_over() -> None:
    pool = CardPool(0.05, "cpu")
    memory = pool.take(64)
    use, other = memory.keep(), memory.keep()
    del use
    with pytest.raises(WeightsUnavailable, match=r"maps the weights for longer than 0\.05 s"):
        pool.take(64)
    del other
    assert pool.take(64) is memory
    assert pool.take(128).nbytes == 128


def test_the_version_before_is_withdrawn_when_its_place_is_needed(redis_url: str, run_name: str) -> None:
    """As long as it is announced, whoever asks for it gets it: the next snapshot may begin only then."""
    channel = CollectiveChannel(redis_url, run_name, BufferConfig(), "ipc", 5.0)
    pool = CardPool(5.0, "cpu")
    memory = filled(pool.take(Layout.of(TENSORS).nbytes))
    channel.send(1, memory)
    newest = channel.latest()
    assert newest is not None
    assert newest.version == 1
    assert memory.kept
    channel.make_room()
    assert channel.latest() is None
    assert pool.take(memory.nbytes) is memory
    channel.close()


def test_each_receiver_gets_a_handle_of_its_own_and_the_sender_waits_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, with the tensors themselves in place of CUDA's handles."""
    handles: list[Mapping[str, torch.Tensor]] = []

    def exported(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        handles.append(tensors)
        return {"handle": len(handles) - 1}

    monkeypatch.setattr(ipc, "exported", exported)
    monkeypatch.setattr(ipc, "mapped", lambda facts, forms: [*handles[facts["handle"]].items()])
    memory = filled(CardMemory(Layout.of(TENSORS).nbytes, "cpu"))
    with ReservedPort() as reserved, ThreadPoolExecutor() as threads:
        group = Epochs("p").open([Request("a", "v", 1), Request("b", "v", 1)], "127.0.0.1", reserved.number)
        sender = IpcSender()
        opening = threads.submit(sender.open, group, 60.0)
        ranks = group.first_ranks.values()
        us = [Membership("ipc", group.epoch, group.host, group.port, 0, 60.0, rank, group.world) for rank in ranks]
        receivers = [IpcReceiver(each, each.first_rank, 60.0) for each in us]
        opening.result()
        for _ in range(2):
            sending = threads.submit(sender.send, memory.tensors(), 60.0)
            for receiver in receivers:
                assert not sending.done()
                got = dict(receiver.receive({}))
                assert all(torch.equal(got[name], TENSORS[name]) for name in TENSORS)
                receiver.loaded()
            sending.result()
    assert len(handles) == 4
    sender.close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"weights\.channel: ipc requires rollout\.share_gpus"),
        ({"rollout": {"share_gpus": True}, "learner": {"ranks": 2}}, r"ipc requires learner\.ranks=1"),
    ],
)
def test_what_it_cannot_do_is_refused_before_the_start(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config.model_validate({"weights": {"channel": "ipc"}, **settings})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=needs.GPUS)
async def test_an_engine_samples_with_the_weights_on_its_card(redis_url: str, run_name: str, tmp_path: Path) -> None:
    """Written without a GPU. The engine's process and this one share the first card."""
    from actors.engine.process import EngineProcess

    models = [make_model(seed, tied=True) for seed in (1, 2)]
    engine = EngineProcess(
        ModelConfig(path=write_model(tmp_path / "model", models[0]), max_prompt_tokens=64, max_response_tokens=32),
        RolloutConfig(episodes_in_flight=4, gpu_memory_utilization=0.2, share_gpus=True),
    )
    await engine.start()
    publisher, reader = (CollectiveChannel(redis_url, run_name, BufferConfig(), "ipc", 60.0) for _ in range(2))
    pool = publisher.pool()
    for version, model in enumerate([models[1], models[0]], start=1):
        tensors = weights_of(model)
        layout = Layout.of(tensors)
        publisher.make_room()
        snapshot = pool.take(layout.nbytes)
        fill(snapshot.places(layout), tensors.items())
        wanted = publisher.send(version, snapshot)
        await engine.receive_weights(await asyncio.to_thread(reader.receive, wanted))
        prompt = list(b"a prompt")
        sample = await engine.generate(prompt, temperature=1.0, max_tokens=8, seed=0)
        theirs = reference_logprobs(model, prompt, sample.token_ids, 1.0)
        assert max(abs(a - b) for a, b in zip(sample.logprobs, theirs, strict=True)) < 0.05
        assert sample.versions[-1].version == version
    publisher.close()
    reader.close()
    await engine.stop()
