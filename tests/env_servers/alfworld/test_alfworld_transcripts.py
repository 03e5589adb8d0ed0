"""The native engine against episodes recorded from the official one.

The transcripts are read from `REFERENCE_DIR`, their games from `ALFWORLD_DATA` or from the archive of the games. Both
forms of a transcript are understood: with texts, and with their SHA-256 instead.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from env_servers.alfworld.environment import DATA_VARIABLE
from env_servers.alfworld.native import NativeGame
from env_servers.alfworld.problem import parse_game
from tests import needs
from tests.official_data import folder_of

SHARED = Path(__file__).parents[4] / "shared"
REFERENCE = Path(os.environ.get("REFERENCE_DIR") or SHARED / "reference")
ARCHIVE = SHARED / "data" / "alfworld.tar.xz"
ROOT = "json_2.1.1"

Episode = Mapping[str, Any]


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    files = sorted(REFERENCE.glob("alfworld_transcripts*.jsonl.xz"))
    if not files:
        pytest.skip(needs.TRANSCRIPTS)
    return [json.loads(line) for file in files for line in lzma.open(file, "rt", encoding="utf-8")]


@pytest.fixture(scope="module")
def games(episodes: list[Episode], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the games' paths start from."""
    folder = folder_of(DATA_VARIABLE)
    if folder is not None:
        root = folder / ROOT
        return root if root.is_dir() else folder
    if not ARCHIVE.is_file():
        pytest.skip(needs.ALFWORLD)
    root = tmp_path_factory.mktemp("games")
    _extract({str(episode["game"]) for episode in episodes}, root)
    return root


def _extract(names: set[str], root: Path) -> None:
    with tarfile.open(ARCHIVE, "r|xz") as archive:
        for member in archive:
            name = member.name.partition(f"{ROOT}/")[2]
            if name in names:
                data = archive.extractfile(member)
                assert data is not None
                (root / name).parent.mkdir(parents=True)
                (root / name).write_bytes(data.read())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def disagreements(episode: Episode, root: Path) -> list[str]:
    """Return the differences between the native engine and the transcript, one line each."""
    play = NativeGame(parse_game(json.loads((root / episode["game"]).read_text())))
    found = []
    for number, step in enumerate(episode["steps"]):
        text = play.introduction if step["action"] is None else play.step(step["action"])
        admissible = play.admissible
        here = f"{episode['game']} step {number} {step['action']!r}"
        if not _agrees(step, "observation", text, text):
            found.append(f"{here}: observation {text!r}")
        if not _agrees(step, "admissible", admissible, "\n".join(admissible)):
            found.append(f"{here}: admissible {admissible}")
        if play.won is not step["won"] or play.won is not step["done"]:
            found.append(f"{here}: won {play.won}")
    return found


def _agrees(step: Mapping[str, Any], key: str, value: object, hashed: str) -> bool:
    if f"{key}_sha256" in step:
        return bool(step[f"{key}_sha256"] == _sha256(hashed))
    return bool(step[key] == value)


def _without_texts(episode: Episode) -> Episode:
    """The same episode as it is recorded where hashes stand for the texts."""
    steps = []
    for step in episode["steps"]:
        hashes = {
            "observation_sha256": step.get("observation_sha256") or _sha256(step["observation"]),
            "admissible_sha256": step.get("admissible_sha256") or _sha256("\n".join(step["admissible"])),
        }
        steps.append({"action": step["action"], "won": step["won"], "done": step["done"], **hashes})
    return {**episode, "steps": steps}


def _all(episodes: Iterable[Episode], root: Path) -> list[str]:
    return [line for episode in episodes for line in disagreements(episode, root)]


def test_every_step_of_every_transcript(episodes: list[Episode], games: Path) -> None:
    assert sum(len(episode["steps"]) for episode in episodes) > 100
    assert _all(episodes, games) == []


def test_transcripts_of_hashes(episodes: list[Episode], games: Path) -> None:
    hashed = [_without_texts(episode) for episode in episodes[:5]]
    assert _all(hashed, games) == []
    wrong = _without_texts(episodes[0])
    wrong["steps"][1]["observation_sha256"] = _sha256("something else")
    wrong["steps"][-1]["admissible_sha256"] = _sha256("")
    assert len(disagreements(wrong, games)) == 2
