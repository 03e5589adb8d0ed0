"""With `max_staleness` 0 the asynchronous system does what a plain sequential loop does: the same groups, token by
token, and the same updates. So it does where learner and actor take turns on a device."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine.interface import EngineStats, InferenceEngine, Sample
from actors.engine.process import EngineProcess
from actors.episode import play
from actors.players import TemplatePlayer
from actors.prompts import PromptBuilder, load_tokenizer
from actors.rollout_actor import Rollout
from env_servers.clients.local import LocalClient
from env_servers.registry import load_environment
from learner.card_turns import start_learner
from learner.dispatch import Dispatcher
from learner.prepare import prepare
from learner.rank.group import RankGroup
from learner.report import UpdateReport
from learner.trainer import Trainer
from services.buffer import Buffer
from services.config.tree import Config
from services.schemas import TRAIN_STREAM, Trajectory
from services.weights import open_channel
from tests.learner.published import published

UPDATES = 3
SPLITS = {"train": 50}

Weights = dict[str, torch.Tensor]
Update = tuple[list[Trajectory], dict[str, float], Weights]


@pytest.fixture
def config(tmp_path: Path, run_name: str) -> Config:
    return Config.model_validate(
        {
            "run": {"name": run_name, "dir": tmp_path},
            "model": {"path": "models/starter", "max_prompt_tokens": 400, "max_response_tokens": 12},
            "env": {"max_steps": 4},
            "prompt": {"template": "compact"},
            "rollout": {"episodes_in_flight": 8, "kv_cache_mib": 32, "share_gpus": "turns"},
            "advantage": {"invalid_action_penalty": 1.0},
            "loss": {"kl_coef": 0.0},
            "optimizer": {"lr": 1e-3},
            "learner": {
                "updates": UPDATES,
                "groups_per_update": 2,
                "group_size": 4,
                "max_staleness": 0,
                "zero_stage": 2,
            },
            "checkpoint": {"every": 100},
            "weights": {"channel": "directory"},
            "telemetry": {"tensorboard": False},
        }
    )


class Kept(InferenceEngine):
    """An engine that outlives its actor."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine
        self.sleeps = 0

    async def sleep(self) -> None:
        self.sleeps += 1
        await self._engine.sleep()

    @property
    def version(self) -> int:
        return self._engine.version

    async def start(self) -> None:
        """It runs already."""

    async def generate(self, *args: Any, **settings: Any) -> Sample:
        return await self._engine.generate(*args, **settings)

    async def load_weights(self, version: int, tensors: Any) -> None:
        await self._engine.load_weights(version, tensors)

    async def stop(self) -> None:
        """It runs on."""

    def stats(self) -> EngineStats:
        return self._engine.stats()


class Bench:
    """What both ways of training share."""

    def __init__(self, config: Config, engine: InferenceEngine, ranks: RankGroup) -> None:
        self.config, self.engine, self.ranks = config, engine, ranks
        self.client = LocalClient(load_environment(config.env.name))
        tokenizer = load_tokenizer(config.model.path)
        self.prompts = PromptBuilder(config.prompt, tokenizer, config.model.max_prompt_tokens)

    async def sequential(self) -> list[Update]:
        """Play a group's episodes one after the other, train, load, again."""
        dispatcher, done = Dispatcher(self.config, SPLITS), []
        for version in range(UPDATES):
            await self.engine.load_weights(version, published(self.ranks))
            dispatcher.advance(UPDATES - version)
            window = dispatcher.window()
            played = [
                await play(ticket, self.client, self.engine, self.prompts, self.config)
                for ticket in dispatcher.tickets(window)
            ]
            groups = [[t for t in played if t.ticket.group == group] for group in window]
            loss = self.ranks.update(prepare(groups, self.config, version).work)
            dispatcher.settle(window)
            done.append((played, loss, published(self.ranks)))
        return done

    async def asynchronous(self, config: Config, buffer: Buffer, engine: InferenceEngine) -> list[Update]:
        """The trainer over Redis and a weight channel, with a rollout actor."""
        done: list[Update] = []

        def note(report: UpdateReport) -> None:
            first = (report.update - 1) * config.learner.groups_per_update
            groups = range(first, first + config.learner.groups_per_update)
            played = [trajectory for group in groups for trajectory in buffer.read(TRAIN_STREAM, group)]
            done.append((played, report.loss, published(self.ranks)))

        channel = open_channel(config.weights, config.run.name, config.run.folder)
        clients = {config.env.name: LocalClient(load_environment(config.env.name))}
        rollout = Rollout(
            "actor",
            config,
            engine=engine,
            environments=clients,
            player=lambda sampler: TemplatePlayer("actor", config, clients, sampler, self.prompts),
            buffer=buffer,
            channel=channel,
        )
        trainer = Trainer(config, buffer, channel, self.ranks, config.run.folder, SPLITS, on_update=note)
        running = asyncio.create_task(rollout.run())
        try:
            await asyncio.to_thread(trainer.train)
        finally:
            await rollout.drain()
            await running
        return done


def overlapping(config: Config) -> Config:
    """The same run under another name, with a device for each of the two."""
    run = config.run.model_copy(update={"name": f"{config.run.name}-plain"})
    rollout = config.rollout.model_copy(update={"share_gpus": False})
    return config.model_copy(update={"run": run, "rollout": rollout})


@pytest.mark.usefixtures("ray_cluster")
async def test_without_staleness_the_system_is_a_sequential_loop_also_in_turns(
    config: Config, redis_url: str, tmp_path: Path
) -> None:
    plainly = overlapping(config)
    buffer, other = (Buffer.connect(redis_url, each.run.name, each.buffer) for each in (config, plainly))
    ranks = await asyncio.to_thread(start_learner, config, buffer)
    engine = EngineProcess(config.model, config.rollout, config.run.seed)
    systems: list[list[Update]] = []
    try:
        await engine.start()
        bench = Bench(config, engine, ranks)
        (tmp_path / "beginning").mkdir()
        ranks.save(tmp_path / "beginning")
        plain = await bench.sequential()
        for each, its_buffer in ((plainly, other), (config, buffer)):
            ranks.load(tmp_path / "beginning")
            kept = Kept(engine)
            systems.append(await bench.asynchronous(each, its_buffer, kept))
            # In turns it sleeps for each update, and at the end, when nobody plays any more.
            assert kept.sleeps == (0 if each is plainly else UPDATES)
    finally:
        await engine.stop()
        ranks.stop()
        buffer.close()
        other.close()
    for system in systems:
        assert_same(system, plain)
    first, last = plain[0][2], plain[-1][2]
    assert any(not torch.equal(first[name], last[name]) for name in first)


def assert_same(system: list[Update], plain: list[Update]) -> None:
    """The same tokens, log-probabilities and updates."""
    assert len(system) == len(plain) == UPDATES
    for version, (ours, theirs) in enumerate(zip(system, plain, strict=True)):
        for here, there in zip(ours[0], theirs[0], strict=True):
            assert here.ticket == there.ticket
            for a, b in zip(here.steps, there.steps, strict=True):
                assert a.prompt_ids.tolist() == b.prompt_ids.tolist()
                assert a.response_ids.tolist() == b.response_ids.tolist()
                np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
                assert {span.version for span in (*a.versions, *b.versions)} == {version}
        assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"], abs=1e-4)
        for name, tensor in ours[2].items():
            torch.testing.assert_close(tensor, theirs[2][name], atol=1e-4, rtol=1e-4)
