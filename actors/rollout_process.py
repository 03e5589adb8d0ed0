"""Process of one rollout actor: builds its parts from a plain description, then plays.

Invariants
- The description is plain data, so any node of the cluster can build the actor; its `repr` contains no secrets.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.engine.interface import InferenceEngine, Sampler
from actors.players import Player, TemplatePlayer
from actors.prompts import load_tokenizer, make_prompts
from actors.replicas import Replicas
from actors.rollout_actor import Rollout
from env_servers.client import EnvironmentClient, open_client
from services.buffer import Buffer
from services.buffer.connection import FEW
from services.buffer.owner import Owner
from services.config.tree import Config, EnvConfig
from services.model_folder import check_model_folder
from services.plugins import make_importable
from services.weights import open_channel

REPLICA_PATIENCE_S = 3.0
"""How long one of several servers may be unavailable before its episodes restart on the others."""

EngineFactory = Callable[[Config], InferenceEngine]


def vllm_engine(config: Config) -> InferenceEngine:
    """The engine of a real run: vLLM in a process of its own."""
    from actors.engine.process import EngineProcess

    return EngineProcess(config.model, config.rollout, config.run.seed)


def freeze_heap() -> None:
    """Take everything that is alive out of garbage collection.

    A full collection walks over all that torch and transformers have built: 0.2 s in which the event loop stands still.
    """
    gc.collect()
    gc.freeze()


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """Everything a rollout actor is built from.

    Attributes:
        config: the run's configuration as JSON.
        redis_url: may contain a password.
        env_urls: addresses of the servers, by environment.
        env_token: bearer token of the environment servers.
        engine: makes the inference engine; a module-level function, because it is sent to other processes.
        default_actors: pool size if none was requested; None: as many as there are places.
        gpus: number of GPUs that an actor requests from Ray, as determined at the start of the run.
        owner: the run's hold on its name in Redis, sent with every write of an actor.
        agent_token: bearer token of outside services that play episodes.
    """

    config: str
    redis_url: str = field(repr=False)
    env_urls: Mapping[str, tuple[str, ...]]
    env_token: str | None = field(default=None, repr=False)
    engine: EngineFactory = vllm_engine
    default_actors: int | None = None
    gpus: int = 0
    owner: Owner | None = None
    agent_token: str | None = field(default=None, repr=False)


class RolloutProcess:
    """Wraps one `Rollout`; the pool makes a Ray actor of it.

    Args:
        name: of the actor.
        spec: what it is built from.
    """

    def __init__(self, name: str, spec: RolloutSpec) -> None:
        self._config = Config.model_validate_json(spec.config)
        logging.basicConfig(level=self._config.telemetry.log_level)
        make_importable(self._config.plugins.folders)
        self._name = name
        self._spec = spec
        self._rollout: Rollout | None = None
        self._drained = False

    async def run(self) -> None:
        """Build the parts and play until drained. Raises as `Rollout.run`."""
        check_model_folder(self._config.model.path)
        engine = self._spec.engine(self._config)
        starting: asyncio.Task[None] | None = None
        if self._config.rollout.share_gpus != "turns":  # otherwise it starts when the actor has the card
            # Started first, because it takes longest and has a process of its own. `Rollout.run` raises its error.
            starting = asyncio.create_task(engine.start())
            starting.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            tokenizer = await asyncio.to_thread(load_tokenizer, self._config.model.path)
            await self._play(engine, tokenizer)
        finally:
            if starting is not None:
                starting.cancel()
            await engine.stop()

    async def _play(self, engine: InferenceEngine, tokenizer: Any) -> None:
        """Build the remaining parts and play."""
        config, spec = self._config, self._spec
        buffer = Buffer.connect(
            spec.redis_url,
            config.run.name,
            config.buffer,
            max_attempts=config.rollout.max_attempts,
            fewest_members=config.rollout.fewest_members,
            owner=spec.owner,
            connections=FEW,
        )
        channel = open_channel(
            config.weights,
            config.run.name,
            config.run.folder,
            redis_url=spec.redis_url,
            buffer=config.buffer,
            reader=self._name,
            width=config.rollout.tensor_parallel,
        )
        try:
            environments = {env.name: self._client(env) for env in config.environments}
            self._rollout = Rollout(
                self._name,
                config,
                engine=engine,
                environments=environments,
                player=lambda sampler: self._player(environments, sampler, tokenizer),
                buffer=buffer,
                channel=channel,
            )
            freeze_heap()
            if not self._drained:
                await self._rollout.run()
        finally:
            channel.close()
            buffer.close()

    def _player(self, environments: Mapping[str, EnvironmentClient], sampler: Sampler, tokenizer: Any) -> Player:
        config = self._config
        if config.agent is not None:
            from actors.gateway.player import AgentPlayer

            token = self._spec.agent_token
            return AgentPlayer(self._name, config, config.agent, environments, sampler, tokenizer, token)
        prompts = make_prompts(config.prompt, tokenizer, config.model.max_prompt_tokens)
        return TemplatePlayer(self._name, config, environments, sampler, prompts)

    def _client(self, env: EnvConfig) -> EnvironmentClient:
        """A client over all servers of an environment."""
        urls = self._spec.env_urls[env.name]
        several = len(urls) > 1
        return Replicas(
            [
                open_client(
                    url,
                    token=self._spec.env_token,
                    timeout_s=env.request_timeout_s,
                    connections=self._config.rollout.episodes_in_flight,
                    **({"patience_s": REPLICA_PATIENCE_S} if several else {}),
                )
                for url in urls
            ]
        )

    async def drain(self) -> None:
        """Release all tickets and let `run` end."""
        self._drained = True
        if self._rollout is not None:
            await self._rollout.drain()

    async def node(self) -> str:
        """Id of the node this process runs on."""
        import ray

        node: str = ray.get_runtime_context().get_node_id()
        return node
