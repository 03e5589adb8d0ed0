"""Local Hugging Face model folders: checks without heavy imports, and access to their weights."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services import manifest
from services.errors import FolderDamaged, ModelUnavailable, first_line

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


def check_model_folder(path: Path) -> None:
    """Check that `path` is a Hugging Face folder with model and tokenizer, and verify its manifest if it has one.

    Raises:
        ModelUnavailable: it is not, or a file is damaged; one line.
    """
    if not path.is_dir():
        raise ModelUnavailable(f"model.path {path} is not a folder; name a local Hugging Face model folder")
    if not (path / "config.json").is_file():
        raise ModelUnavailable(f"model.path {path} holds no config.json; name a local Hugging Face model folder")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ModelUnavailable(f"model.path {path} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); copy it there")
    weights = [file for pattern in WEIGHT_PATTERNS for file in path.glob(pattern)]
    if not weights:
        raise ModelUnavailable(f"model.path {path} holds no weights ({', '.join(WEIGHT_PATTERNS)}); copy them there")
    for file in weights:
        if not os.access(file, os.R_OK):
            raise ModelUnavailable(f"model.path: user {os.getuid()} cannot read {file}; chmod a+r it")
    if (path / manifest.MANIFEST_NAME).is_file():
        try:
            manifest.verify(path)
        except FolderDamaged as error:
            raise ModelUnavailable(
                f"{error}; export it again, or remove {manifest.MANIFEST_NAME} if the change is intended"
            ) from None


def check_tokenizer(path: Path) -> None:
    """Raise `ModelUnavailable` if `tokenizer.json` cannot be loaded. Other kinds of tokenizers are not checked."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    if not file.is_file():
        return
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ModelUnavailable(f"cannot load the tokenizer {file}: {first_line(error)}") from None


def stored_parameters(path: Path) -> int:
    """Number of parameters in the folder's safetensors files, by their headers; 0 if there are none.

    Raises:
        ModelUnavailable: a file is truncated or damaged, or one that the index lists is missing.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise ModelUnavailable(f"cannot read {index}: copy it again") from None
        if missing := sorted(name for name in named if not (path / str(name)).is_file()):
            raise ModelUnavailable(f"missing weights in {path}: {missing[0]}, which {index.name} lists; copy it there")
    return sum(_parameters_in(file) for file in path.glob("*.safetensors"))


def _parameters_in(file: Path) -> int:
    """Number of parameters in one safetensors file.

    Layout: the length of the header (uint64, little-endian), the header (JSON), the tensors up to the end of the file.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("damaged header")
            header = json.loads(opened.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in tensors), default=0)
        if file.stat().st_size != 8 + length + end:
            raise ValueError(f"size is {file.stat().st_size} bytes, {8 + length + end} expected")
        return sum(math.prod(entry["shape"]) for entry in tensors)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelUnavailable(f"cannot read the weights {file}: {first_line(error)}; copy the file again") from None


def share_weights(folder: Path) -> None:
    """Give the weights the permissions of `config.json`; safetensors creates files that only the owner may read."""
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model, sorted; empty if its weights are in another format.

    A folder may hold the same weights twice, in another layout (`consolidated.safetensors`): the index, or
    `model.safetensors`, decides which files count.

    Raises:
        ModelUnavailable: the index is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelUnavailable(f"cannot read {index}: {first_line(error)}") from None
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape by name of the folder's tensors; empty if its weights are in another format. Raises ModelUnavailable."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        with _opened(file) as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return shapes


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of the folder's safetensors files, by name.

    Raises:
        ModelUnavailable: there are no such files, or one cannot be read.
    """
    if not weight_files(folder):
        raise ModelUnavailable(f"no *.safetensors in {folder}; name a local Hugging Face model folder (model.path)")
    return dict(read_others(folder, ()))


def read_others(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the folder's tensors except `names`, one by one. Raises ModelUnavailable."""
    left_out = frozenset(names)
    for file in weight_files(folder):
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if name not in left_out:
                    yield name, opened.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise ModelUnavailable(f"cannot read {file}: {error}") from None
