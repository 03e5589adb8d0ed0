from __future__ import annotations

import random

from actors.scripted import HabitualPlayer, NoisyExpert, Turn, play_scripted
from env_servers.alfworld.environment import AlfWorld
from env_servers.client import LocalClient
from services.schemas import Task

TASKS = [Task(env="alfworld", split="train", index=index) for index in range(24)]


async def episodes(expert: bool, noise: float = 0.0) -> list[list[Turn]]:
    client = LocalClient(AlfWorld)
    played = []
    for task in TASKS:
        rng = random.Random(task.index)
        player = NoisyExpert(rng, noise) if expert else HabitualPlayer(rng)
        played.append([turn async for turn in play_scripted(client, task, player, 40)])
    await client.close()
    return played


def wins(played: list[list[Turn]]) -> int:
    return sum(len(turns) < 40 for turns in played)


async def test_the_expert_wins_and_noise_makes_it_worse() -> None:
    clean, noisy = await episodes(expert=True), await episodes(expert=True, noise=0.8)
    assert wins(clean) >= len(TASKS) - 2
    assert wins(noisy) < len(TASKS) * 0.7


async def test_players_without_a_goal_stay_within_the_rules_and_rarely_win() -> None:
    played = await episodes(expert=False)
    assert all(turn.action in (turn.result.admissible or []) for turns in played for turn in turns)
    assert wins(played) < len(TASKS) / 4


async def test_the_seed_decides_the_episode() -> None:
    first, second = await episodes(expert=True, noise=0.5), await episodes(expert=True, noise=0.5)
    assert [[t.action for t in turns] for turns in first] == [[t.action for t in turns] for turns in second]
