"""Generated games: the same everywhere, of all task types, solvable, in splits that are really apart."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from env_servers.alfworld.generator import SPLITS, generate
from env_servers.alfworld.native import NativeGame
from env_servers.alfworld.problem import TASK_TYPES, parse_game

DIGESTS = """
import hashlib, json
from env_servers.alfworld.generator import SPLITS, generate
for split in SPLITS:
    for index in range(6):
        print(hashlib.sha256(json.dumps(generate(split, index)).encode()).hexdigest())
"""


def test_same_in_every_process() -> None:
    here = [hashlib.sha256(json.dumps(generate(s, i)).encode()).hexdigest() for s in SPLITS for i in range(6)]
    for seed in ("1", "2"):
        process = subprocess.run(
            [sys.executable, "-c", DIGESTS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert process.stdout.split() == here


@pytest.mark.parametrize("split", SPLITS)
def test_every_game_is_solved_by_its_walkthrough(split: str) -> None:
    types: Counter[str] = Counter()
    for index in range(60):
        play = NativeGame(parse_game(generate(split, index)))
        types[play.game.goal.task_type] += 1
        assert not play.won
        for command in play.game.walkthrough:
            assert not play.won
            assert command in play.admissible
            play.step(command)
        assert play.won, (split, index)
    assert set(types) == set(TASK_TYPES)


def test_task_types_take_turns() -> None:
    assert [parse_game(generate("train", index)).goal.task_type for index in range(6)] == list(TASK_TYPES)


def _problem(split: str, index: int) -> str:
    """The problem without its title, which names split and index."""
    text = str(generate(split, index)["pddl_problem"])
    return text[text.index("(:domain") :]


def _receptacles(problem: str) -> set[str]:
    return set(re.findall(r"\(receptacleAtLocation (\w+) ", problem))


def test_splits_share_no_game_and_unseen_rooms_are_unseen() -> None:
    problems = {split: [_problem(split, index) for index in range(256)] for split in SPLITS}
    everything = [problem for split in problems.values() for problem in split]
    assert len(set(everything)) == len(everything)
    rooms = {split: set().union(*map(_receptacles, texts)) for split, texts in problems.items()}
    assert not rooms["valid_unseen"] & (rooms["train"] | rooms["valid_seen"])
    assert rooms["valid_seen"] & rooms["train"]


def test_unknown_split() -> None:
    with pytest.raises(KeyError):
        generate("test", 0)


def test_data_variable_and_home_are_left_alone(tmp_path: os.PathLike[str]) -> None:
    """The package sets the variable and makes a folder when it is imported; the generator does neither."""
    script = "import os; from concurrent.futures import ThreadPoolExecutor; "
    script += "from env_servers.alfworld.generator import generate; "
    script += "list(ThreadPoolExecutor(8).map(lambda index: generate('train', index), range(8))); "
    script += "print(os.environ.get('ALFWORLD_DATA'), os.listdir(os.environ['HOME']))"
    environment = {key: value for key, value in os.environ.items() if key != "ALFWORLD_DATA"}
    process = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert process.stdout.strip() == "None []"
