"""What runs in the process of one rollout actor: builds its parts from a plain description, then plays.

Invariants
- The description is plain data, so that any node of the cluster can build the actor; its secrets are not in its `repr`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.engine import InferenceEngine
from actors.prompts import PromptBuilder, load_tokenizer
from actors.rollout_actor import Rollout
from env_servers.client import HttpClient
from services.buffer import Buffer
from services.config.tree import Config
from services.model_folder import check_model_folder
from services.weights import open_channel

EngineFactory = Callable[[Config], InferenceEngine]


def vllm_engine(config: Config) -> InferenceEngine:
    """The engine of a real run."""
    from actors.engine_vllm import VllmEngine

    return VllmEngine(config.model, config.rollout, config.run.seed)


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """All that a rollout actor is built from.

    Attributes:
        config: the run's configuration as JSON.
        redis_url: may carry a password. env_urls: actors are spread over them. env_token: of the environment servers.
        engine: makes the inference engine; a module-level function, since it travels to other processes.
        default_actors: how many actors the pool keeps without a wish; None: as many as there are places.
    """

    config: str
    redis_url: str = field(repr=False)
    env_urls: tuple[str, ...]
    env_token: str | None = field(default=None, repr=False)
    engine: EngineFactory = vllm_engine
    default_actors: int | None = None


class RolloutProcess:
    """Wraps one `Rollout`; the pool makes a Ray actor of it. `number` picks its environment server."""

    def __init__(self, name: str, number: int, spec: RolloutSpec) -> None:
        self._config = Config.model_validate_json(spec.config)
        logging.basicConfig(level=self._config.telemetry.log_level)
        self._name = name
        self._number = number
        self._spec = spec
        self._rollout: Rollout | None = None
        self._drained = False

    async def run(self) -> None:
        """Build the parts and play until drained; errors as for `Rollout.run`."""
        config, spec = self._config, self._spec
        check_model_folder(config.model.path)
        url = spec.env_urls[self._number % len(spec.env_urls)]
        tokenizer = load_tokenizer(config.model.path)
        buffer = Buffer.connect(
            spec.redis_url, config.run.name, config.buffer, max_attempts=config.rollout.max_attempts
        )
        try:
            self._rollout = Rollout(
                self._name,
                config,
                engine=spec.engine(config),
                client=HttpClient(
                    url,
                    token=spec.env_token,
                    timeout_s=config.env.request_timeout_s,
                    connections=config.rollout.episodes_in_flight,
                ),
                prompts=PromptBuilder(config.prompt, tokenizer, config.model.max_prompt_tokens),
                buffer=buffer,
                channel=open_channel(config.weights, config.run.name, config.run.folder),
            )
            if not self._drained:
                await self._rollout.run()
        finally:
            buffer.close()

    async def drain(self) -> None:
        """Give the tickets back and let `run` end."""
        self._drained = True
        if self._rollout is not None:
            await self._rollout.drain()

    async def pid(self) -> int:
        """Process id on the actor's node."""
        return os.getpid()
