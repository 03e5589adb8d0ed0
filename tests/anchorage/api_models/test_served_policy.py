"""vLLM's own server on the starter policy: the episodes over HTTP are those of the run's engine, word for word."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from typing import Literal

import pytest
import pytest_asyncio

from actors.engine.process import EngineProcess
from actors.episode import action_form, play
from actors.prompts import PromptBuilder, load_tokenizer
from anchorage.api_models.client import ApiModel
from anchorage.api_models.play import EpisodePlayer
from anchorage.api_models.prompts import ApiPrompts
from anchorage.api_models.settings import ApiOptions, endpoint
from anchorage.runs.environments import environment_class
from env_servers.clients.local import LocalClient
from learner.evaluation import panel
from services.config import load_config
from services.config.tree import Config
from services.schemas import Trajectory
from tests import needs
from tests.processes import ROOT, free_port
from tests.tiers import long
from tests.waiting import until

pytestmark = [long, pytest.mark.skipif(find_spec("vllm") is None, reason=needs.VLLM)]

EPISODES = 24
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
"""docs/api-models.md has it too."""


@pytest.fixture(scope="module")
def config() -> Config:
    overrides = [f"model.path={ROOT / 'models/starter'}", "evaluation.temperature=0"]
    return load_config(ROOT / "configs" / "demo.yaml", [*overrides, f"evaluation.episodes={EPISODES}"])


@pytest.fixture(scope="module")
def served(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of `vllm serve` on a CPU."""
    port, log = free_port(), tmp_path_factory.mktemp("served") / "log"
    model = config.model
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model.path)]
    command += ["--served-model-name", "starter", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(model.max_prompt_tokens + model.max_response_tokens), "--dtype", model.dtype]
    command += ["--generation-config", "vllm", "--enforce-eager", "--max-num-seqs", "32", "--block-size", "32"]
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048", "--chat-template", TEMPLATE]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",  # compiling small functions of the sampler needs a C++ compiler
    }
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=log.parent)
    try:
        until(lambda: server.poll() is not None or is_healthy(port), seconds=500)
        assert server.poll() is None, log.read_text()[-4000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest_asyncio.fixture
async def engine(config: Config) -> AsyncIterator[EngineProcess]:
    engine = EngineProcess(config.model, config.rollout)
    await engine.start()
    yield engine
    await engine.stop()


@pytest.mark.parametrize("route", ["completions", "chat"])
async def test_the_starter_policy_over_http_plays_the_episodes_of_the_local_engine(
    route: Literal["completions", "chat"], config: Config, served: str, engine: EngineProcess
) -> None:
    environment = LocalClient(environment_class(config.env))
    tickets = panel(config, dict((await environment.info()).splits), "eval")
    form = await action_form(environment, config, config.env.name)
    local = PromptBuilder(config.prompt, load_tokenizer(config.model.path), config.model.max_prompt_tokens)
    remote, options = ApiPrompts(config), ApiOptions(url=served, route=route, at_once=EPISODES, timeout_s=300.0)
    try:
        here = await asyncio.gather(
            *(play(ticket, environment, engine, local, config, form=form) for ticket in tickets)
        )
        most = config.model.max_response_tokens
        async with ApiModel("starter", endpoint(options, {}), options, most_tokens=most, thoughts=False) as model:
            players = [EpisodePlayer(model, remote, route == "completions") for _ in tickets]
            there = await asyncio.gather(
                *(
                    play(ticket, environment, player, remote, config, form=form)
                    for ticket, player in zip(tickets, players, strict=True)
                )
            )
    finally:
        await environment.close()
    assert [told(episode) for episode in there] == [told(episode) for episode in here]
    assert 0 < sum(episode.won for episode in here) < EPISODES
    calls = [call for player in players for call in player.calls]
    assert sum(call.reply.tokens_in or 0 for call in calls) == sum(
        len(step.prompt_ids) for episode in here for step in episode.steps
    )
    assert model.not_accepted == []


def told(episode: Trajectory) -> list[tuple[str, str, bool, bool]]:
    return [(step.response, step.action, step.valid, step.finished) for step in episode.steps]
