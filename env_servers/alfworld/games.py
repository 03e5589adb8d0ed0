"""Finds the games of a split: the official files where a folder is given, generated games otherwise.

Invariants
- Task `index` of a split names the same game in every process: official files are ordered by path.
- Parsed games are shared between sessions; the cache is bounded.
"""

from __future__ import annotations

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

from env_servers.alfworld import generator
from env_servers.alfworld.problem import Game, parse_game
from env_servers.environment import BrokenTask, UnknownTask

SPLITS = ("train", "valid_seen", "valid_unseen")
_CACHED_GAMES = 512
_DATA_FOLDER = "json_2.1.1"


class GameSource(ABC):
    """Where the games come from."""

    name: str

    @property
    @abstractmethod
    def splits(self) -> Mapping[str, int]:
        """Number of games of every split that has any."""

    @abstractmethod
    def document(self, split: str, index: int) -> Mapping[str, object]:
        """The game file's content.

        Raises:
            UnknownTask: no such split or index.
            BrokenTask: the file cannot be read.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of which games there are, in which order. It does not depend on who plays them."""

    def __init__(self) -> None:
        self._parsed = functools.lru_cache(maxsize=_CACHED_GAMES)(self._parse)

    def game(self, split: str, index: int) -> Game:
        """The parsed game; raises as `document` does, and BrokenTask where it cannot be played."""
        return self._parsed(split, index)

    def _parse(self, split: str, index: int) -> Game:
        return parse_game(self.document(split, index))

    def _check(self, split: str, index: int) -> None:
        size = self.splits.get(split)
        if size is None:
            raise UnknownTask(f"no split '{split}' here: choose one of {', '.join(self.splits)}")
        if not 0 <= index < size:
            raise UnknownTask(f"split '{split}' has tasks 0 to {size - 1}, not {index}")


class GeneratedGames(GameSource):
    """Games of our own generator, made when they are asked for."""

    name = "generated"

    @property
    def splits(self) -> Mapping[str, int]:
        return generator.SPLITS

    @functools.cached_property
    def fingerprint(self) -> str:
        """By the splits and the first game of each: the others come from the same generator."""
        try:
            games = {split: generator.generate(split, 0) for split in self.splits}
        except ImportError as error:
            raise BrokenTask(f"games cannot be generated: {error}; install alfworld, or give official games") from None
        return _digest(f"{split} {size} {json.dumps(games[split])}" for split, size in self.splits.items())

    def document(self, split: str, index: int) -> Mapping[str, object]:
        self._check(split, index)
        return generator.generate(split, index)


class OfficialGames(GameSource):
    """The `game.tw-pddl` files below a folder in the official layout."""

    name = "official"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        root = folder / _DATA_FOLDER if (folder / _DATA_FOLDER).is_dir() else folder
        self._files = {split: sorted((root / split).glob("*/*/game.tw-pddl")) for split in SPLITS}
        self._sizes = {split: len(files) for split, files in self._files.items() if files}
        if not self._sizes:
            raise BrokenTask(f"no ALFWorld games below {folder}: expected {_DATA_FOLDER}/<split>/*/*/game.tw-pddl")

    @property
    def splits(self) -> Mapping[str, int]:
        return self._sizes

    @functools.cached_property
    def fingerprint(self) -> str:
        """By the files' paths, which name tasks and trials, and their sizes: gigabytes are not read for it."""
        return _digest(
            f"{split} {file.parts[-3:]} {file.stat().st_size}" for split, files in self._files.items() for file in files
        )

    def document(self, split: str, index: int) -> Mapping[str, object]:
        self._check(split, index)
        file = self._files[split][index]
        try:
            document = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise BrokenTask(f"cannot read the game file {file.parent.name}/{file.name}: {error}") from None
        if not isinstance(document, dict):
            raise BrokenTask(f"the game file {file.parent.name}/{file.name} holds no JSON object")
        return document


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def open_games(folder: Path | None) -> GameSource:
    """The official games below `folder`, or generated ones for None.

    Raises:
        BrokenTask: the folder holds no games.
    """
    return GeneratedGames() if folder is None else OfficialGames(folder)
