"""`anchorage warmstart`: makes a small starter policy from scripted episodes, tokenizer included."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from services.config.load import dump_config
from services.config.tree import Config
from services.schemas import Task

_TOKENIZER_EPISODES = 600
_RECIPE_FILE = "warmstart.json"


def make_starter(config: Config, out: Path, on_progress: Callable[[Any, int], None]) -> dict[str, object]:
    """Train a starter policy and write it to `out`; answers the figures that stand in its recipe file.

    `on_progress` gets a `FitProgress` and the number of tokens of the whole training.
    """
    import torch

    from actors.prompts import PromptBuilder
    from learner import warmstart

    torch.set_num_threads(config.warmstart.threads)
    started = time.time()
    tokenizer = warmstart.train_tokenizer(_texts(config), config.warmstart.vocab_size)
    limit = config.model.max_prompt_tokens + config.model.max_response_tokens
    model = warmstart.new_model(
        config.warmstart, len(tokenizer), tokenizer.eos_token_id, max(1024, limit), config.run.seed
    )
    prompts = PromptBuilder(config.prompt, tokenizer, config.model.max_prompt_tokens)
    last: list[Any] = []

    def note(progress: Any) -> None:
        last[:] = [progress]
        on_progress(progress, config.warmstart.tokens)

    warmstart.fit(model, _examples(config, prompts, tokenizer), config.warmstart, note)
    warmstart.save(model, tokenizer, out)
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.time() - started, 1),
        "steps": last[0].step,
        "tokens": last[0].tokens,
        "response_loss": round(last[0].response_loss, 4),
        "prompt_loss": round(last[0].prompt_loss, 4),
    }
    recipe = {"figures": figures, "config": dump_config(config)}
    (out / _RECIPE_FILE).write_text(json.dumps(recipe, indent=1) + "\n")
    return figures


def _episodes(config: Config, salt: str) -> Iterator[tuple[Task, random.Random]]:
    """Endless tasks of the training split in a seeded order, each with a generator of its own."""
    from env_servers.registry import load_environment

    size = load_environment(config.env.name).splits()[config.env.split]
    order = random.Random(f"warmstart {salt} {config.run.seed}")
    number = 0
    while True:
        task = Task(env=config.env.name, split=config.env.split, index=order.randrange(size))
        yield task, random.Random(f"warmstart {salt} {config.run.seed} {number}")
        number += 1


def _turns(config: Config, salt: str) -> Iterator[list[Any]]:
    """The turns of endless scripted episodes, an episode at a time."""
    from actors.scripted import HabitualPlayer, NoisyExpert, Player, play_scripted
    from env_servers.client import LocalClient
    from env_servers.registry import load_environment

    client = LocalClient(load_environment(config.env.name))
    low, high = config.warmstart.noise

    async def episode(task: Task, player: Player) -> list[Any]:
        return [turn async for turn in play_scripted(client, task, player, config.env.max_steps)]

    with asyncio.Runner() as runner:
        for task, rng in _episodes(config, salt):
            expert = rng.random() < config.warmstart.expert_share
            player: Player = NoisyExpert(rng, rng.uniform(low, high)) if expert else HabitualPlayer(rng)
            yield runner.run(episode(task, player))


def _texts(config: Config) -> Iterator[str]:
    from actors.prompts import render_compact

    turns = _turns(config, "tokenizer")
    for _ in range(_TOKENIZER_EPISODES):
        for turn in next(turns):
            recent = turn.history[-config.prompt.history_length :] if config.prompt.history_length else ()
            yield render_compact(turn.goal, recent, turn.result) + f" {turn.action}"


def _examples(config: Config, prompts: Any, tokenizer: Any) -> Iterator[Any]:
    from actors.scripted import to_example

    for turns in _turns(config, "examples"):
        for turn in turns:
            yield to_example(turn, prompts, tokenizer)
