"""What runs in the process of one rollout actor: builds its parts from a plain description, then plays.

Invariants
- The description is plain data, so that any node of the cluster can build the actor; its secrets are not in its `repr`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.engine.interface import InferenceEngine
from actors.prompts import PromptBuilder, load_tokenizer
from actors.replicas import Replicas
from actors.rollout_actor import Rollout
from env_servers.client import EnvironmentClient, open_client
from services.buffer import Buffer
from services.buffer.owner import Owner
from services.config.tree import Config, EnvConfig
from services.model_folder import check_model_folder
from services.plugins import make_importable
from services.weights import open_channel

REPLICA_PATIENCE_S = 3.0
"""How long one of several servers may be away before its episodes begin again on the others."""

EngineFactory = Callable[[Config], InferenceEngine]


def vllm_engine(config: Config) -> InferenceEngine:
    """The engine of a real run."""
    from actors.engine.process import EngineProcess

    return EngineProcess(config.model, config.rollout, config.run.seed)


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """All that a rollout actor is built from.

    Attributes:
        config: the run's configuration as JSON.
        redis_url: may carry a password. env_urls: by environment, the addresses of its servers. env_token: theirs.
        engine: makes the inference engine; a module-level function, since it travels to other processes.
        default_actors: how many actors the pool keeps without a wish; None: as many as there are places.
        gpus: that an actor asks Ray for, as found out when the run began.
        owner: the run's hold on its name in Redis, shown with whatever an actor writes there.
    """

    config: str
    redis_url: str = field(repr=False)
    env_urls: Mapping[str, tuple[str, ...]]
    env_token: str | None = field(default=None, repr=False)
    engine: EngineFactory = vllm_engine
    default_actors: int | None = None
    gpus: int = 0
    owner: Owner | None = None


class RolloutProcess:
    """Wraps one `Rollout`; the pool makes a Ray actor of it."""

    def __init__(self, name: str, spec: RolloutSpec) -> None:
        self._config = Config.model_validate_json(spec.config)
        logging.basicConfig(level=self._config.telemetry.log_level)
        make_importable(self._config.plugins.folders)
        self._name = name
        self._spec = spec
        self._rollout: Rollout | None = None
        self._drained = False

    async def run(self) -> None:
        """Build the parts and play until drained; errors as for `Rollout.run`."""
        check_model_folder(self._config.model.path)
        engine = self._spec.engine(self._config)
        # It takes longest, and in a process of its own: so it is begun first. `Rollout.run` tells what comes of it.
        starting = asyncio.create_task(engine.start())
        starting.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            tokenizer = await asyncio.to_thread(load_tokenizer, self._config.model.path)
            await self._play(engine, tokenizer)
        finally:
            starting.cancel()
            await engine.stop()

    async def _play(self, engine: InferenceEngine, tokenizer: Any) -> None:
        config, spec = self._config, self._spec
        buffer = Buffer.connect(
            spec.redis_url,
            config.run.name,
            config.buffer,
            max_attempts=config.rollout.max_attempts,
            fewest_members=config.rollout.fewest_members,
            owner=spec.owner,
        )
        channel = open_channel(
            config.weights,
            config.run.name,
            config.run.folder,
            redis_url=spec.redis_url,
            reader=self._name,
            width=config.rollout.tensor_parallel,
        )
        try:
            self._rollout = Rollout(
                self._name,
                config,
                engine=engine,
                environments={env.name: self._client(env) for env in config.environments},
                prompts=PromptBuilder(config.prompt, tokenizer, config.model.max_prompt_tokens),
                buffer=buffer,
                channel=channel,
            )
            if not self._drained:
                await self._rollout.run()
        finally:
            channel.close()
            buffer.close()

    def _client(self, env: EnvConfig) -> EnvironmentClient:
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
        """Give the tickets back and let `run` end."""
        self._drained = True
        if self._rollout is not None:
            await self._rollout.drain()

    async def node(self) -> str:
        """Id of the node it is on."""
        import ray

        node: str = ray.get_runtime_context().get_node_id()
        return node
