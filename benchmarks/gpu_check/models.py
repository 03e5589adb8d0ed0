"""Models without a download: random weights of stated sizes, with the starter policy's tokenizer.

Weights have a standard deviation of 1.5 / sqrt(hidden): with the usual 0.02 a layer hardly attends to anything, and an
error is as small as rounding.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.gpu_check.settings import Settings
from services import packaged
from services.errors import AnchorageError, did_you_mean

SPREAD = 1.5
_QWEN = {"num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 32_768}
SIZES: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        # The published sizes of Qwen2.5: heads of 64 (0.5B) and of 128.
        "0.5b": _QWEN
        | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
        "1.5b": _QWEN
        | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
        "tiny-64": {
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 1127,
            "max_position_embeddings": 2048,
        },
        "tiny-128": {
            "hidden_size": 256,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 1127,
            "max_position_embeddings": 2048,
        },
    }
)
"""Sizes by name. `tiny-…` are those of `--dry`."""


def folder_of(settings: Settings, name: str | None = None) -> Path:
    """Return the folder of a model, made at its first use.

    Args:
        settings: of the check.
        name: of a size, or a folder; None: that of the settings.

    Raises:
        AnchorageError: there is neither such a size nor such a folder.
    """
    name = name or settings.model
    if (own := own_folder(name)) is not None:
        return own
    folder = settings.folder / f"model-{name}"
    if not (folder / "model.safetensors").exists() and not (folder / "model.safetensors.index.json").exists():
        write(SIZES[name], folder, settings.device)
    return folder


def own_folder(name: str) -> Path | None:
    """Return the folder that `--model` names; None: it names a size. Raises AnchorageError, as `folder_of`."""
    if name in SIZES:
        return None
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise AnchorageError(
            f"--model {name}: not a folder with a config.json, and no known size{did_you_mean(name, list(SIZES))}"
        )
    return folder


def write(sizes: dict[str, Any], folder: Path, device: str, seed: int = 0) -> None:
    """Write a random Qwen2 model in bfloat16, made on `device`, with the starter policy's tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    starter = packaged.find(Path("models/starter"))
    shutil.copytree(starter, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"), dirs_exist_ok=True)
    known = json.loads((starter / "config.json").read_text())
    ends = {name: known[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Qwen2Config(**sizes, **ends, rope_theta=1_000_000.0, tie_word_embeddings=True)
    config.initializer_range = SPREAD / sizes["hidden_size"] ** 0.5
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
