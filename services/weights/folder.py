"""Reads the weights of a Hugging Face model folder, for publishing them before any learner has run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from services.errors import ModelUnavailable

if TYPE_CHECKING:
    import torch


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
