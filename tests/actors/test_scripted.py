from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from actors.prompts import PromptBuilder, load_tokenizer
from actors.scripted import HabitualPlayer, NoisyExpert, PolicyPlayer, Turn, play_scripted, renumbered, to_examples
from env_servers.alfworld.environment import AlfWorld
from env_servers.clients.local import LocalClient
from env_servers.protocol import ResetRequest
from services.config.tree import Config, PromptConfig
from services.schemas import Task
from tests.actors.scripted_engine import ScriptedEngine

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


class Characters:
    """A tokenizer whose tokens are characters."""

    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]


async def test_an_episode_is_one_row_whose_labels_are_the_players_probabilities() -> None:
    turns = max(await episodes(expert=True, noise=0.5), key=len)
    prompts = PromptBuilder(PromptConfig(template="compact"), Characters(), 100_000)
    for only_experts in (False, True):
        (row,) = to_examples(turns, prompts, Characters(), only_experts)
        text = "".join(map(chr, row.tokens))
        assert text.count("\n>") == len(turns)
        assert all(abs(sum(chances.values()) - 1) < 1e-9 for chances in row.targets if chances)
        place = 0
        for turn in turns:
            intent = {turn.result.expert or "": 1.0} if only_experts else turn.intent
            place = text.index(f"> {turn.action}\0", place) + 1
            chance = math.prod(
                row.targets[place + n].get(ord(letter), 0.0) for n, letter in enumerate(f" {turn.action}\0")
            )
            assert chance == pytest.approx(intent.get(turn.action, 0.0))
        assert sum(map(bool, row.targets)) <= sum(len(turn.action) + 2 for turn in turns)


@pytest.mark.parametrize("expert", [True, False])
async def test_intent_is_how_the_player_acts(expert: bool) -> None:
    client, task = LocalClient(AlfWorld), TASKS[0]
    start = await client.reset(ResetRequest(split=task.split, index=task.index, expert=True))
    player = NoisyExpert(random.Random(1), 0.6, mistakes=0.0) if expert else HabitualPlayer(random.Random(1))
    intent, draws = player.intent(start), Counter(player.act(start) for _ in range(5000))
    assert set(intent) == set(start.admissible or [])
    assert sum(intent.values()) == pytest.approx(1.0)
    assert all(draws[action] / 5000 == pytest.approx(chance, abs=0.03) for action, chance in intent.items())
    await client.close()


async def test_mistakes_are_commands_that_no_longer_apply() -> None:
    turns = [turn for played in await episodes(expert=True, noise=0.5) for turn in played]
    wrong = [turn for turn in turns if turn.action not in (turn.result.admissible or [])]
    assert 0 < len(wrong) < len(turns) / 10


async def test_an_episode_beyond_the_limit_becomes_several_rows() -> None:
    turns = max(await episodes(expert=True, noise=0.5), key=len)
    whole, short = (PromptBuilder(PromptConfig(template="compact"), Characters(), limit) for limit in (100_000, 1500))
    rows = list(to_examples(turns, short, Characters(), only_experts=False))
    assert len(rows) > 1
    (row,) = to_examples(turns, whole, Characters(), only_experts=False)
    assert [t for r in rows for t in r.targets if t] == [t for t in row.targets if t]


async def test_slips_are_wrong_numbers_and_what_is_to_be_avoided_is_not_done() -> None:
    client, actions = LocalClient(AlfWorld), []
    for task in TASKS:
        player = NoisyExpert(random.Random(task.index), 0.8, mistakes=0.0, slips=0.3, avoid=["help", "look"])
        actions += [turn async for turn in play_scripted(client, task, player, 30)]
    await client.close()
    wrong = [turn for turn in actions if turn.action not in (turn.result.admissible or [])]
    assert len(actions) / 20 < len(wrong) < len(actions) / 3
    assert all(turn.action[-1].isdigit() for turn in wrong)
    assert not {"help", "look"} & {turn.action for turn in actions}


async def test_renumbering_renames_things_and_changes_nothing_else() -> None:
    (played, *_) = await episodes(expert=True, noise=0.3)
    other = renumbered(played, random.Random(0))
    assert [turn.action for turn in other] != [turn.action for turn in played]
    there = {}
    for before, after in zip(played, other, strict=True):
        for old, new in (
            (before.action, after.action),
            *zip(before.result.admissible or [], after.result.admissible or [], strict=True),
        ):
            assert there.setdefault(old, new) == new
        assert after.result.observation.split()[:4] == before.result.observation.split()[:4]
        assert (after.action in (after.result.admissible or [])) == (before.action in (before.result.admissible or []))
        assert (after.action == after.result.expert) == (before.action == before.result.expert)
    assert len(set(there.values())) == len(there)


async def test_a_policy_plays_itself_and_the_expert_says_what_it_should_have_done(config: Config) -> None:
    client, task = LocalClient(AlfWorld), TASKS[0]
    engine = ScriptedEngine(config.model.path)
    roomy = config.model_copy(update={"model": config.model.model_copy(update={"max_prompt_tokens": 4000})})
    prompts = PromptBuilder(roomy.prompt, load_tokenizer(roomy.model.path), 4000)
    policy = PolicyPlayer(engine, prompts, roomy, seed=3)
    turns = [turn async for turn in play_scripted(client, task, NoisyExpert(random.Random(0), 0.3), 8, policy)]
    await client.close()
    assert len(turns) == 8
    assert {turn.action for turn in turns} <= {"up", "down"}
    assert len(set(engine.seeds)) == 8
    assert all(turn.intent[turn.result.expert or ""] > 0.7 for turn in turns)
    assert len({turn.result.expert for turn in turns}) == 1  # nothing happened, so it still wants the same
