"""ALFWorld as an environment: what a reset and a step say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from env_servers.alfworld.environment import DATA_VARIABLE, AlfWorld, game_source
from env_servers.alfworld.games import GameSource
from env_servers.environment import BrokenTask, UnknownTask

pytestmark = pytest.mark.usefixtures("generated_games")


def test_generated_games_unless_a_folder_is_named() -> None:
    about = dict(AlfWorld.about())
    assert len(about.pop("fingerprint")) == 32
    assert about == {"engine": "native", "source": "generated"}
    assert AlfWorld.splits() == {"train": 4096, "train_large": 4096, "valid_seen": 256, "valid_unseen": 256}


def test_folder_of_games(
    kitchen: Callable[..., dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "json_2.1.1" / "valid_seen" / "look" / "trial" / "game.tw-pddl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(kitchen("look_at_obj_in_light")))
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    game_source.cache_clear()
    assert AlfWorld.about()["source"] == "official"
    assert AlfWorld.splits() == {"valid_seen": 1}
    assert AlfWorld().reset("valid_seen", 0).facts["task_type"] == "look_at_obj_in_light"


class OnAnotherEngine(AlfWorld):
    """Says that it is played by another engine."""

    engine = "other"


def test_the_fingerprint_is_that_of_the_games(
    kitchen: Callable[..., dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: str, names: dict[str, str]) -> None:
        for name, task_type in names.items():
            file = tmp_path / folder / "valid_seen" / name / "trial" / "game.tw-pddl"
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(kitchen(task_type)))

    def fingerprint(folder: str | None) -> str:
        if folder is not None:
            monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / folder))
        game_source.cache_clear()
        assert AlfWorld.about()["fingerprint"] == OnAnotherEngine.about()["fingerprint"]
        return AlfWorld.about()["fingerprint"]

    games = {"a": "look_at_obj_in_light", "b": "pick_two_obj_and_place"}
    write("one", games)
    write("copy", dict(reversed(games.items())))
    write("fewer", {"a": "look_at_obj_in_light"})
    write("renamed", {"a": "look_at_obj_in_light", "c": "pick_two_obj_and_place"})
    write("changed", {**games, "b": "pick_and_place_simple"})
    found = [fingerprint(folder) for folder in (None, "one", "copy", "fewer", "renamed", "changed")]
    assert found[1] == found[2]
    assert len(set(found)) == 5


def test_folder_without_games(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    game_source.cache_clear()
    with pytest.raises(BrokenTask, match="no ALFWorld games in"):
        AlfWorld.splits()


def test_reset() -> None:
    seen = AlfWorld().reset("train", 5)
    assert seen.text.startswith("-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room.")
    assert seen.text.endswith(f"Your task is to: {seen.facts['goal']}")
    assert (seen.reward, seen.terminated, seen.truncated, seen.expert) == (0.0, False, False, None)
    assert seen.facts["task_type"] == "pick_two_obj_and_place"
    assert (seen.facts["won"], seen.facts["score"]) == (False, 0.0)
    assert seen.admissible is not None
    assert list(seen.admissible) == sorted(set(seen.admissible))
    assert {"help", "inventory", "look"} < set(seen.admissible)


def test_walkthrough_earns_one_at_its_end(generated_games: GameSource) -> None:
    environment = AlfWorld()
    environment.reset("valid_unseen", 2)
    walkthrough = generated_games.game("valid_unseen", 2).walkthrough
    seen = [environment.step(command) for command in walkthrough]
    assert [observation.reward for observation in seen] == [0.0] * (len(seen) - 1) + [1.0]
    assert [observation.terminated for observation in seen] == [False] * (len(seen) - 1) + [True]
    assert (seen[-1].facts["won"], seen[-1].facts["score"]) == (True, 1.0)


def test_expert_wins_when_it_is_followed() -> None:
    for index in range(6):
        environment = AlfWorld()
        seen = environment.reset("valid_seen", index, expert=True)
        for _ in range(50):
            if seen.terminated:
                break
            assert seen.expert in (seen.admissible or ())
            seen = environment.step(str(seen.expert))
        assert seen.terminated
        assert seen.expert is None


def test_reset_again_and_in_another_session_is_the_same() -> None:
    environment = AlfWorld()
    first = environment.reset("train", 7, expert=True)
    environment.step(str(first.expert))
    assert environment.reset("train", 7, expert=True) == first
    assert AlfWorld().reset("train", 7, expert=True) == first
    assert environment.reset("train", 7).expert is None


def test_nothing_happens_is_a_transition_like_any_other() -> None:
    environment = AlfWorld()
    before = environment.reset("train", 0)
    after = environment.step("dance")
    assert after.text == "Nothing happens."
    assert (after.state, after.admissible, after.reward) == (before.state, before.admissible, 0.0)


@pytest.mark.parametrize(("split", "index"), [("test", 0), ("train", 4096)])
def test_unknown_task(split: str, index: int) -> None:
    with pytest.raises(UnknownTask):
        AlfWorld().reset(split, index)
