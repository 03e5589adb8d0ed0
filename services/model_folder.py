"""A local Hugging Face model folder: whether it can be loaded, told before anything heavy is imported; its weights."""

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
    """Raise `ModelUnavailable` with one line unless `path` is a Hugging Face folder with model and tokenizer.

    Where it has a manifest, as an exported policy does, its files must be those that were written.
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
            raise ModelUnavailable(f"model.path: user {os.getuid()} may not read {file}; chmod a+r it")
    if (path / manifest.MANIFEST_NAME).is_file():
        try:
            manifest.verify(path)
        except FolderDamaged as error:
            raise ModelUnavailable(
                f"{error}; export it again, or remove {manifest.MANIFEST_NAME} where the change is intended"
            ) from None


def check_tokenizer(path: Path) -> None:
    """Raise `ModelUnavailable` where `tokenizer.json` cannot be loaded. Other kinds of tokenizers are not checked."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    if not file.is_file():
        return
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ModelUnavailable(f"cannot load the tokenizer {file}: {first_line(error)}") from None


def stored_parameters(path: Path) -> int:
    """Number of parameters in the folder's safetensors files, by their headers; 0 where there are none.

    Raises:
        ModelUnavailable: a file is cut short or damaged, or one that the index names is missing.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise ModelUnavailable(f"cannot read {index}: copy it again") from None
        if missing := sorted(name for name in named if not (path / str(name)).is_file()):
            raise ModelUnavailable(f"missing weights in {path}: {missing[0]}, which {index.name} names; copy it there")
    return sum(_parameters_in(file) for file in path.glob("*.safetensors"))


def _parameters_in(file: Path) -> int:
    """Of one safetensors file: 8 bytes with the length of the header, the header, and the tensors up to the end."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("its header is damaged")
            header = json.loads(opened.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in tensors), default=0)
        if file.stat().st_size != 8 + length + end:
            raise ValueError(f"it has {file.stat().st_size} bytes, {8 + length + end} are needed")
        return sum(math.prod(entry["shape"]) for entry in tensors)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelUnavailable(f"cannot read the weights {file}: {first_line(error)}; copy the file again") from None


def share_weights(folder: Path) -> None:
    """Let whoever may read the folder's configuration read its weights; safetensors writes for the owner alone."""
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model, in order; none where its weights are in another format.

    Folders may hold the same weights twice, in another layout (`consolidated.safetensors`): an index, or
    `model.safetensors`, says which ones count.
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
    """Shapes of the folder's tensors; none where its weights are in another format. Raises ModelUnavailable."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        with _opened(file) as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return shapes


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's safetensors files, by name.

    Raises:
        ModelUnavailable: there are none, or one cannot be read.
    """
    if not weight_files(folder):
        raise ModelUnavailable(f"no *.safetensors in {folder}; give a local Hugging Face model folder (model.path)")
    return dict(read_others(folder, ()))


def read_others(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The folder's tensors but `names`, one by one. Raises ModelUnavailable."""
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
