"""The rules that surprise, one by one, in the small kitchen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from env_servers.alfworld.native import HELP, NOTHING_HAPPENS, NativeGame
from env_servers.alfworld.problem import parse_game

Document = dict[str, object]
Start = Callable[..., NativeGame]


@pytest.fixture
def start(kitchen: Callable[..., Document]) -> Start:
    """Starts a play of the kitchen after some commands, all of which must be admissible."""

    def begin(*commands: str, **options: object) -> NativeGame:
        play = NativeGame(parse_game(kitchen(**options)))
        for command in commands:
            assert command in play.admissible, (command, play.admissible)
            play.step(command)
        return play

    return begin


TAKE_APPLE = ("go to countertop 1", "take apple 1 from countertop 1")
TAKE_POTATO = ("go to fridge 1", "open fridge 1", "take potato 1 from fridge 1")


def test_introduction_lists_the_room_and_the_goal(start: Start) -> None:
    assert start().introduction == (
        "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around you, you see "
        "a countertop 1, a drawer 2, a drawer 1, a fridge 1, a microwave 1, a sidetable 1, a sink 1, and a sinkbasin 1."
        "\n\nYour task is to: tidy the kitchen."
    )


def test_introduction_at_a_receptacle_faces_it(start: Start) -> None:
    assert (
        "You are facing the fridge 1, and microwave 1. Next to it, you see nothing."
        in start(start="loc_1").introduction
    )


def test_look_away_from_receptacles_sees_nothing(start: Start) -> None:
    play = start()
    assert play.step("look") == "You are in the middle of a room. Looking quickly around you, you see nothing."


def test_no_way_to_where_one_stands(start: Start) -> None:
    play = start("go to fridge 1")
    assert "go to fridge 1" not in play.admissible
    assert "go to microwave 1" not in play.admissible
    assert play.step("go to fridge 1") == NOTHING_HAPPENS


@pytest.mark.parametrize("command", ["Look", "look around", "go  to fridge 1", "", "take apple 9 from countertop 1"])
def test_other_commands_change_nothing(start: Start, command: str) -> None:
    play = start()
    before = play.digest
    assert play.step(command) == NOTHING_HAPPENS
    assert play.digest == before


def test_white_space_around_a_command_is_ignored(start: Start) -> None:
    assert start().step(" inventory\n") == "You are not carrying anything."


def test_help(start: Start) -> None:
    text = start().step("help")
    assert text == HELP
    assert text.startswith("Available commands:\n  look:")
    assert text.endswith("sharp object\n")


def test_only_what_is_held_can_be_examined(start: Start) -> None:
    play = start("go to countertop 1")
    assert "examine apple 1" not in play.admissible
    play.step("take apple 1 from countertop 1")
    assert play.step("examine apple 1") == "There's nothing special about apple 1."


def test_one_hand(start: Start) -> None:
    play = start(*TAKE_APPLE)
    assert play.step("inventory") == "You are carrying: a apple 1."
    assert not any(command.startswith("take") for command in play.admissible)


def test_closed_receptacles_hide_and_refuse(start: Start) -> None:
    play = start(*TAKE_APPLE)
    assert play.step("go to fridge 1") == "You arrive at fridge 1. The fridge 1 is closed."
    assert "move apple 1 to fridge 1" not in play.admissible
    assert play.step("open fridge 1") == "You open the fridge 1. The fridge 1 is open. In it, you see a potato 1."
    assert play.step("move apple 1 to fridge 1") == "You move the apple 1 to the fridge 1."
    assert play.step("examine fridge 1") == "The fridge 1 is open. In it, you see a apple 1, and a potato 1."
    assert play.step("close fridge 1") == "You close the fridge 1."
    assert "take apple 1 from fridge 1" not in play.admissible


def test_heating_and_cooling_ignore_the_door_and_undo_each_other(start: Start) -> None:
    play = start(*TAKE_APPLE, "go to microwave 1")
    assert play.step("heat apple 1 with microwave 1") == "You heat the apple 1 using the microwave 1."
    assert play.step("examine apple 1") == "This is a hot apple 1."
    assert play.step("cool apple 1 with fridge 1") == "You cool the apple 1 using the fridge 1."
    assert play.step("examine apple 1") == "This is a cold apple 1."
    play.step("heat apple 1 with microwave 1")
    play.step("heat apple 1 with microwave 1")
    assert play.step("examine apple 1") == "This is a hot apple 1."


def test_cool_from_the_start(start: Start) -> None:
    assert start(*TAKE_POTATO).step("examine potato 1") == "This is a cold potato 1."


@pytest.mark.parametrize(("official", "sinks"), [(False, ["sinkbasin 1"]), (True, ["sink 1", "sinkbasin 1"])])
def test_which_sinks_clean(start: Start, official: bool, sinks: list[str]) -> None:
    play = start(*TAKE_POTATO, "go to sinkbasin 1", official_domain=official)
    able = [command for command in play.admissible if command.startswith("clean")]
    assert able == [f"clean potato 1 with {sink}" for sink in sinks]
    assert play.step(able[-1]) == "You clean the potato 1 using the sinkbasin 1."
    assert play.step("examine potato 1") == "This is a cool and clean potato 1."


def test_slicing_takes_a_held_knife_and_leaves_the_thing(start: Start) -> None:
    play = start("go to countertop 1", "take knife 1 from countertop 1")
    assert play.step("slice apple 1 with knife 1") == "You sliced the apple 1 with the knife 1."
    assert "slice apple 1 with knife 1" in play.admissible
    play.step("move knife 1 to countertop 1")
    assert "slice apple 2 with knife 1" not in play.admissible
    play.step("take apple 1 from countertop 1")
    assert play.step("examine apple 1") == "This is a sliced apple 1."


def test_lamps_ignore_closed_doors_and_stay_used(start: Start) -> None:
    play = start("go to drawer 1")
    lidded = [command for command in play.admissible if command.startswith("use")]
    assert lidded == ["use candle 1"]
    assert play.step("use candle 1") == "You turn on the candle 1."
    assert play.step("use candle 1") == "You turn on the candle 1."


def test_a_receptacle_object_names_what_was_in_it_for_ever(start: Start) -> None:
    play = start("go to countertop 1", "take spoon 1 from countertop 1", "move spoon 1 to countertop 1")
    play.step("take mug 1 from countertop 1")
    assert play.step("examine mug 1") == "This is a normal mug 1. In it, you see a spoon 1."


def test_look_lists_what_came_from_the_other_receptacle_here(start: Start) -> None:
    play = start(*TAKE_POTATO, "open microwave 1")
    assert play.step("look") == "You are facing the fridge 1, and microwave 1. Next to it, you see nothing."
    play.step("move potato 1 to microwave 1")
    assert play.step("look") == "You are facing the fridge 1, and microwave 1. Next to it, you see a potato 1."
    play.step("take potato 1 from microwave 1")
    play.step("move potato 1 to fridge 1")
    assert play.step("look") == "You are facing the fridge 1, and microwave 1. Next to it, you see a potato 1."


@pytest.mark.parametrize(
    ("task_type", "commands"),
    [
        ("pick_and_place_simple", [*TAKE_APPLE, "go to drawer 1", "open drawer 1", "move apple 1 to drawer 1"]),
        ("look_at_obj_in_light", ["go to sidetable 1", "use desklamp 1", "take book 1 from sidetable 1"]),
        ("look_at_obj_in_light", ["go to sidetable 1", "take book 1 from sidetable 1", "use desklamp 1"]),
        (
            "pick_heat_then_place_in_recep",
            [
                *TAKE_APPLE,
                "go to fridge 1",
                "heat apple 1 with microwave 1",
                "open fridge 1",
                "move apple 1 to fridge 1",
            ],
        ),
        ("pick_cool_then_place_in_recep", [*TAKE_POTATO, "go to countertop 1", "move potato 1 to countertop 1"]),
    ],
)
def test_winning(start: Start, task_type: str, commands: list[str]) -> None:
    play = start(*commands[:-1], task_type=task_type)
    assert not play.won
    play.step(commands[-1])
    assert play.won


def test_two_must_be_in_one_place(start: Start) -> None:
    one = [*TAKE_APPLE, "go to drawer 1", "open drawer 1", "move apple 1 to drawer 1"]
    two = ["go to countertop 1", "take apple 2 from countertop 1", "go to drawer 1", "open drawer 2"]
    play = start(*one, *two, "move apple 2 to drawer 2", task_type="pick_two_obj_and_place")
    assert not play.won
    play.step("take apple 2 from drawer 2")
    play.step("move apple 2 to drawer 1")
    assert play.won


def test_digest_tells_states_apart_and_knows_them_again(start: Start) -> None:
    play = start("go to countertop 1")
    there = play.digest
    play.step("examine countertop 1")
    play.step("inventory")
    assert play.digest == there
    play.step("go to drawer 1")
    assert play.digest != there
    play.step("go to countertop 1")
    assert play.digest == there
    play.step("take apple 1 from countertop 1")
    play.step("move apple 1 to countertop 1")
    assert play.digest == there


def test_plays_of_one_game_are_apart(kitchen: Callable[..., Document]) -> None:
    game = parse_game(kitchen())
    first, second = NativeGame(game), NativeGame(game)
    for command in TAKE_APPLE:
        first.step(command)
    assert second.admissible == NativeGame(game).admissible
    assert second.step("inventory") == "You are not carrying anything."
