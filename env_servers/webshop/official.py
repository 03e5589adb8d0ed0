"""Reads the official files of WebShop from a folder, plain or compressed with xz.

Invariants
- Files are read as streams: fields that the shop does not need are never stored.
- The files of the small set (1,000 products) take precedence over those of the full set.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import ijson

from env_servers.environment import BrokenTask
from env_servers.webshop.products import Product, Record, make_products

PRODUCT_FILES = ("items_shuffle_1000.json", "items_shuffle.json")
ATTRIBUTE_FILES = ("items_ins_v2_1000.json", "items_ins_v2.json")
HUMAN_FILE = "items_human_ins.json"


def load_official(folder: Path, products: int | None = None, *, human: bool = False) -> list[Product]:
    """Return the products of the first `products` records of the official files; None: of all records.

    Args:
        folder: holds the files under their official names, each plain or with the suffix `.xz`.
        human: also read the crowd-written instructions.

    Raises:
        BrokenTask: a file is missing or unreadable.
    """
    if not folder.is_dir():
        raise BrokenTask(f"not a directory: {folder}; set WEBSHOP_DATA to the folder that holds {PRODUCT_FILES[0]}")
    small = _find(folder, PRODUCT_FILES[0]) is not None
    records = _find_one(folder, PRODUCT_FILES)
    attributes = _find_one(folder, ATTRIBUTE_FILES if small else ATTRIBUTE_FILES[::-1])
    written: Mapping[str, Any] = dict(_pairs(_find_one(folder, (HUMAN_FILE,)))) if human else {}
    notes = {asin: _note(note) for asin, note in _pairs(attributes)}
    return list(make_products(islice(_items(records), products), notes, written))


def _note(note: Record) -> Record:
    return {key: note[key] for key in ("attributes", "instruction", "instruction_attributes") if key in note}


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.xz") if path.is_file()), None)


def _find_one(folder: Path, names: tuple[str, ...]) -> Path:
    found = next((path for name in names if (path := _find(folder, name)) is not None), None)
    if found is None:
        raise BrokenTask(
            f"missing file: no {' or '.join(names)} in {folder}, plain or with .xz; see WebShop's data release"
        )
    return found


def _items(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        yield from _parsed(path, ijson.items(file, "item"))


def _pairs(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        yield from _parsed(path, ijson.kvitems(file, ""))


def _open(path: Path) -> IO[bytes]:
    return lzma.open(path) if path.suffix == ".xz" else path.open("rb")


def _parsed(path: Path, parts: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from parts
    except (OSError, EOFError, lzma.LZMAError, ijson.JSONError) as error:
        raise BrokenTask(f"cannot read {path.name}: {error}") from None
