"""Game files: what is read out of them, and what is said about broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from env_servers.alfworld.games import OfficialGames, open_games
from env_servers.alfworld.problem import TASK_TYPES, parse_game, read_goal
from env_servers.environment import BrokenTask, UnknownTask

Document = dict[str, object]


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_task_type_comes_from_the_goal(kitchen: Callable[..., Document], task_type: str) -> None:
    game = parse_game(kitchen(task_type))
    assert game.goal.task_type == task_type
    assert game.goal_text == "tidy the kitchen."


def test_names_count_down_from_the_first_id(kitchen: Callable[..., Document]) -> None:
    game = parse_game(kitchen())
    assert [r.name for r in game.receptacles] == [
        "countertop 1",
        "drawer 2",
        "drawer 1",
        "fridge 1",
        "microwave 1",
        "sidetable 1",
        "sink 1",
        "sinkbasin 1",
    ]
    assert [thing.name for thing in game.objects[:2]] == ["apple 2", "apple 1"]


def test_only_what_the_domain_names_cleans(kitchen: Callable[..., Document]) -> None:
    assert parse_game(kitchen()).cleaner_types == {"sinkbasintype"}
    assert parse_game(kitchen(official_domain=True)).cleaner_types == {"sinktype", "sinkbasintype"}


@pytest.mark.parametrize("key", ["pddl_domain", "grammar", "pddl_problem"])
def test_missing_part(kitchen: Callable[..., Document], key: str) -> None:
    document = kitchen()
    del document[key]
    with pytest.raises(BrokenTask, match=f"not an ALFWorld game file: {key} missing"):
        parse_game(document)


@pytest.mark.parametrize(
    ("key", "old", "new", "message"),
    [
        ("pddl_domain", "(isHot ?o)", "(isCool ?o)", "unknown domain or grammar, not one of ALFWorld's"),
        ("grammar", "You open the", "You pull at the", "unknown domain or grammar, not one of ALFWorld's"),
        ("grammar", "Your task is to", "Please", "no goal sentence in the grammar"),
        ("pddl_problem", "(:goal", "(:metric", "no :goal in the problem"),
        ("pddl_problem", "(:init", "(:start", "no :init"),
        ("pddl_problem", "(receptacleType ?r DrawerType)", "", "unknown form of goal"),
        ("pddl_problem", "(atLocation agent1 loc_0)", "", "not a playable ALFWorld problem"),
        (
            "pddl_problem",
            "(objectAtLocation Mug_bar_1 loc_2)",
            "(inReceptacle Cup_bar_9 Drawer_bar_1)",
            "not a playable",
        ),
    ],
)
def test_broken_part(kitchen: Callable[..., Document], key: str, old: str, new: str, message: str) -> None:
    document = kitchen()
    text = str(document[key])
    assert old in text
    with pytest.raises(BrokenTask, match=message) as caught:
        parse_game({**document, key: text.replace(old, new)})
    assert "\n" not in str(caught.value)


def test_goal_can_be_read_whatever_the_rules_are(kitchen: Callable[..., Document]) -> None:
    goal, sentence = read_goal({**kitchen("pick_two_obj_and_place"), "pddl_domain": "(define (domain other))"})
    assert (goal.kind, goal.object_type, goal.target_type) == ("two", "appletype", "drawertype")
    assert sentence == "tidy the kitchen."


def write_game(folder: Path, text: str, trial: str = "trial_1") -> Path:
    file = folder / "json_2.1.1" / "train" / "pick_and_place_simple-Apple-None-Drawer-1" / trial / "game.tw-pddl"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return file


def test_folder_of_games(kitchen: Callable[..., Document], tmp_path: Path) -> None:
    write_game(tmp_path, json.dumps(kitchen()))
    for folder in (tmp_path, tmp_path / "json_2.1.1"):
        games = open_games(folder)
        assert games.name == "official"
        assert games.splits == {"train": 1}
        assert games.game("train", 0).goal_text == "tidy the kitchen."


def test_folder_without_games(tmp_path: Path) -> None:
    with pytest.raises(BrokenTask, match="no ALFWorld games in"):
        open_games(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot read the game file trial_1/game.tw-pddl"), ("[1]", "not a JSON object"), ("{}", "pddl_domain")],
)
def test_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    write_game(tmp_path, text)
    with pytest.raises(BrokenTask, match=message):
        OfficialGames(tmp_path).game("train", 0)


def test_file_that_went_away(kitchen: Callable[..., Document], tmp_path: Path) -> None:
    file = write_game(tmp_path, json.dumps(kitchen()))
    games = OfficialGames(tmp_path)
    file.unlink()
    with pytest.raises(BrokenTask, match="cannot read the game file"):
        games.game("train", 0)


@pytest.mark.parametrize(("split", "index"), [("test", 0), ("train", 1), ("train", -1)])
def test_unknown_task(kitchen: Callable[..., Document], tmp_path: Path, split: str, index: int) -> None:
    write_game(tmp_path, json.dumps(kitchen()))
    with pytest.raises(UnknownTask, match="choose one of train" if split == "test" else "has tasks 0 to 0"):
        OfficialGames(tmp_path).game(split, index)
