"""The native engine against the official one, step by step: texts, admissible commands, `won`, equality of states."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from env_servers.alfworld.games import GameSource
from env_servers.alfworld.native import NativeGame
from env_servers.alfworld.problem import TASK_TYPES, parse_game
from env_servers.alfworld.textworld_worker import TextWorldGame
from tests import needs

Document = Mapping[str, object]
ODD_COMMANDS = (
    "xyzzy",
    "",
    " look ",
    "Look",
    "go  to nowhere 1",
    "take apple 1",
    "put mug 1 in/on sinkbasin 1",
    "help me",
)
VERBS = ("take", "move", "open", "close", "examine", "use", "heat", "cool", "clean", "slice", "go")

SURPRISES = """
"look; go to sidetable 1; use desklamp 1; use desklamp 1; examine desklamp 1; take book 1 from
sidetable 1; look; examine book 1; move book 1 to sidetable 1; go to countertop 1; examine mug 1;
take mug 1 from countertop 1; examine mug 1; look; move mug 1 to countertop 1; look; take knife 1
from countertop 1; slice apple 1 with knife 1; slice apple 1 with knife 1; move knife 1 to
countertop 1; look; take apple 1 from countertop 1; examine apple 1; go to fridge 1; cool apple 1
with fridge 1; examine apple 1; open microwave 1; heat apple 1 with microwave 1; examine apple 1;
move apple 1 to microwave 1; look; close microwave 1; look; use apple 1; open microwave 1; take
apple 1 from microwave 1; look; open fridge 1; move apple 1 to fridge 1; look; take potato 1 from
fridge 1; look; examine potato 1; heat potato 1 with microwave 1; examine potato 1; go to sinkbasin
1; clean potato 1 with sink 1; clean potato 1 with sinkbasin 1; examine potato 1; move potato 1 to
sink 1; look; inventory; go to drawer 1; look; use candle 1; open drawer 1; take candle 1 from
drawer 1; examine candle 1; move candle 1 to drawer 2; open drawer 2; move candle 1 to drawer 2;
look; use candle 1; close drawer 2; use candle 1; open drawer 2; take candle 1 from drawer 2;
examine candle 1; move candle 1 to drawer 1; look; help
"""


@pytest.fixture(scope="module")
def textworld_game() -> TextWorldGame:
    pytest.importorskip("textworld", reason=needs.TEXTWORLD)
    return TextWorldGame()


class Comparison:
    """Plays both engines side by side."""

    def __init__(self, document: Document, official: TextWorldGame) -> None:
        self.native = NativeGame(parse_game(document))
        self._official = official
        self._digests: dict[str, str] = {}
        self._check("(reset)", self.native.introduction, official.start(document))

    def step(self, command: str) -> None:
        self._check(command, self.native.step(command), self._official.step(command))

    def _check(self, command: str, text: str, official_text: str) -> None:
        native, official = self.native, self._official
        assert text == official_text, command
        assert native.admissible == official.admissible, command
        assert native.won == official.won, command
        assert self._digests.setdefault(native.digest, official.digest) == official.digest, command
        assert len(set(self._digests.values())) == len(self._digests), command


def mixed_commands(play: NativeGame, rng: random.Random, first: Sequence[str], count: int) -> Iterator[str]:
    """`count` commands: `first` and then random ones, rare verbs preferred, with inadmissible ones between them."""
    ahead = list(first)
    for _ in range(count):
        draw = rng.random()
        if draw < 0.08:
            yield rng.choice(ODD_COMMANDS)
        elif draw < 0.18:
            yield _invented(play, rng)
        elif ahead:
            yield ahead.pop(0)
        else:
            by_verb = defaultdict(list)
            for command in play.admissible:
                by_verb[command.partition(" ")[0]].append(command)
            yield rng.choice(by_verb[rng.choice(sorted(by_verb))])


def _invented(play: NativeGame, rng: random.Random) -> str:
    """A command about things of this game that is seldom possible now."""
    thing, place = rng.choice(play.game.objects).name, rng.choice(play.game.receptacles).name
    verb = rng.choice(VERBS)
    joint = {"take": "from", "move": "to", "heat": "with", "cool": "with", "clean": "with", "slice": "with"}.get(verb)
    if joint is not None:
        return f"{verb} {thing} {joint} {place}"
    return f"go to {place}" if verb == "go" else f"{verb} {rng.choice((thing, place))}"


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_kitchen(kitchen: Callable[..., Document], textworld_game: TextWorldGame, task_type: str) -> None:
    number = TASK_TYPES.index(task_type)
    document = kitchen(task_type, start=("loc_0", "loc_2", "loc_5")[number % 3], official_domain=number % 2 == 0)
    comparison = Comparison(document, textworld_game)
    for command in mixed_commands(comparison.native, random.Random(task_type), (), 50):
        comparison.step(command)


def test_what_surprises(kitchen: Callable[..., Document], textworld_game: TextWorldGame) -> None:
    comparison = Comparison(kitchen(official_domain=True), textworld_game)
    for command in SURPRISES.split(";"):
        comparison.step(" ".join(command.split()))


@pytest.mark.parametrize("index", range(3))
def test_generated(textworld_game: TextWorldGame, generated_games: GameSource, index: int) -> None:
    document = generated_games.document("valid_unseen" if index % 2 else "train", 61 + index)
    comparison = Comparison(document, textworld_game)
    first = comparison.native.game.walkthrough if index % 3 else ()
    for command in mixed_commands(comparison.native, random.Random(index), first, 25):
        comparison.step(command)


@pytest.mark.parametrize("part", range(3))
def test_official(textworld_game: TextWorldGame, official_games: GameSource, part: int) -> None:
    split, size = next(iter(official_games.splits.items()))
    comparison = Comparison(official_games.document(split, size * part // 3 + 7), textworld_game)
    first = comparison.native.game.walkthrough if part % 3 else ()
    for command in mixed_commands(comparison.native, random.Random(part), first, 25):
        comparison.step(command)
