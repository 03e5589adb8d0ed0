"""Finds the games of a split: official files if a folder is given, generated games otherwise.

Invariants
- Task `index` of a split is the same game in every process: official files are sorted by path.
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
    """A source of games: official files or the generator."""

    name: str

    @property
    @abstractmethod
    def splits(self) -> Mapping[str, int]:
        """Split → number of games; empty splits are left out."""

    @abstractmethod
    def document(self, split: str, index: int) -> Mapping[str, object]:
        """Return the parsed JSON of the game file.

        Raises:
            UnknownTask: unknown split, or index out of range.
            BrokenTask: the file is unreadable.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of the games and their order. It does not depend on the engine that plays them."""

    def __init__(self) -> None:
        self._parsed = functools.lru_cache(maxsize=_CACHED_GAMES)(self._parse)

    def game(self, split: str, index: int) -> Game:
        """Return the parsed game. Raises like `document`, and BrokenTask if the game cannot be played."""
        return self._parsed(split, index)

    def _parse(self, split: str, index: int) -> Game:
        return parse_game(self.document(split, index))

    def _check(self, split: str, index: int) -> None:
        size = self.splits.get(split)
        if size is None:
            raise UnknownTask(f"unknown split '{split}': choose one of {', '.join(self.splits)}")
        if not 0 <= index < size:
            raise UnknownTask(f"index out of range: split '{split}' has tasks 0 to {size - 1}, got {index}")


class GeneratedGames(GameSource):
    """Games of our own generator, generated on demand."""

    name = "generated"

    @property
    def splits(self) -> Mapping[str, int]:
        return generator.SPLITS

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the split sizes and the first game of each split; the same generator makes the other games."""
        try:
            games = {split: generator.generate(split, 0) for split in self.splits}
        except ImportError as error:
            raise BrokenTask(f"cannot generate games: {error}; install alfworld or set ALFWORLD_DATA") from None
        return _digest(f"{split} {size} {json.dumps(games[split])}" for split, size in self.splits.items())

    def document(self, split: str, index: int) -> Mapping[str, object]:
        self._check(split, index)
        return generator.generate(split, index)


class OfficialGames(GameSource):
    """The `game.tw-pddl` files under a folder in the official layout."""

    name = "official"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        root = folder / _DATA_FOLDER if (folder / _DATA_FOLDER).is_dir() else folder
        self._files = {split: sorted((root / split).glob("*/*/game.tw-pddl")) for split in SPLITS}
        self._sizes = {split: len(files) for split, files in self._files.items() if files}
        if not self._sizes:
            raise BrokenTask(f"no ALFWorld games in {folder}: expected {_DATA_FOLDER}/<split>/*/*/game.tw-pddl")

    @property
    def splits(self) -> Mapping[str, int]:
        return self._sizes

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the files' paths, which name tasks and trials, and sizes; the content (gigabytes) is not read."""
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
            raise BrokenTask(f"not a JSON object: game file {file.parent.name}/{file.name}")
        return document


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def open_games(folder: Path | None) -> GameSource:
    """Return the official games in `folder`, or generated games if `folder` is None.

    Raises:
        BrokenTask: the folder holds no games.
    """
    return GeneratedGames() if folder is None else OfficialGames(folder)
