"""The scripted experts win, from the start and from wherever other actions left the game."""

from __future__ import annotations

import random

import pytest

from env_servers.alfworld.expert import Expert, Planner, Searcher
from env_servers.alfworld.generator import SPLITS, generate
from env_servers.alfworld.native import NOTHING_HAPPENS, NativeGame
from env_servers.alfworld.problem import Game, parse_game

LIMIT = 50


@pytest.fixture(scope="module")
def games() -> list[Game]:
    return [parse_game(generate(split, index)) for split in SPLITS for index in range(100)]


def wins(play: NativeGame, expert: Expert, limit: int = LIMIT) -> bool:
    """Whether the expert wins within `limit` commands, each of which does something."""
    for _ in range(limit):
        if play.won:
            break
        command = expert.next_command()
        if command is None:
            break
        assert play.step(command) != NOTHING_HAPPENS, command
        expert.observe()
    return play.won


def test_planner_wins_every_game(games: list[Game]) -> None:
    plays = [NativeGame(game) for game in games]
    assert all(wins(play, Planner(play)) for play in plays)


def test_searcher_wins_nearly_every_game(games: list[Game]) -> None:
    plays = [NativeGame(game) for game in games]
    won = sum(wins(play, Searcher(play)) for number, play in enumerate(plays))
    assert won >= 0.99 * len(games)


def test_searcher_searches(games: list[Game]) -> None:
    """It does not know what it has not seen, so it needs more commands than the planner."""
    lengths = {Planner: 0, Searcher: 0}
    for game in games[:60]:
        for kind in (Planner, Searcher):
            play = NativeGame(game)
            expert = Planner(play) if kind is Planner else Searcher(play)
            while not play.won and lengths[kind] < 10_000:
                play.step(str(expert.next_command()))
                expert.observe()
                lengths[kind] += 1
    assert lengths[Searcher] > 1.3 * lengths[Planner]


def test_experts_go_on_after_other_actions(games: list[Game]) -> None:
    rng = random.Random(5)
    won = dict.fromkeys((Planner, Searcher), 0)
    for game in games:
        for kind in (Planner, Searcher):
            play = NativeGame(game)
            expert = Planner(play) if kind is Planner else Searcher(play)
            for _ in range(12):
                if not play.won:
                    play.step(rng.choice(play.admissible))
                    expert.observe()
            won[kind] += wins(play, expert)
    assert won[Planner] == len(games)
    assert won[Searcher] >= 0.98 * len(games)


def test_searcher_looks_at_open_places_before_it_opens_any(games: list[Game]) -> None:
    play = NativeGame(games[2])
    expert = Searcher(play)
    places = {receptacle.name: receptacle for receptacle in play.game.receptacles}
    visited = []
    while not play.won:
        command = str(expert.next_command())
        if command.startswith("go to ") and play.held is None:
            visited.append(places[command.removeprefix("go to ")].openable)
        play.step(command)
        expert.observe()
    assert visited == sorted(visited)


def test_nothing_to_do_after_the_win(games: list[Game]) -> None:
    play = NativeGame(games[0])
    planner = Planner(play)
    assert wins(play, planner)
    assert planner.next_command() is None
