"""A local Hugging Face model folder: whether it can be loaded, told before anything heavy is imported; its weights."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from services.errors import ModelUnavailable

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


def check_model_folder(path: Path) -> None:
    """Raise `ModelUnavailable` with one line unless `path` is a Hugging Face folder with model and tokenizer."""
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


def share_weights(folder: Path) -> None:
    """Let whoever may read the folder's configuration read its weights; safetensors writes for the owner alone."""
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's safetensors files, by name.

    Raises:
        ModelUnavailable: there are none, or one cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelUnavailable(f"no *.safetensors in {folder}; give a local Hugging Face model folder (model.path)")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ModelUnavailable(f"cannot read {file}: {error}") from None
    return weights
