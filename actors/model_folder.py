"""Whether a folder holds a model that an engine can load, told before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from services.errors import ModelUnavailable

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
    if not any(any(path.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        raise ModelUnavailable(f"model.path {path} holds no weights ({', '.join(WEIGHT_PATTERNS)}); copy them there")
