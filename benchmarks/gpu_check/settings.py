"""What every check needs to know. It crosses to the processes of the groups as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

CARD_NEEDED = "no CUDA GPU is visible"


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one invocation.

    Attributes:
        dry: small sizes on the CPU, to exercise the code; its figures say nothing about GPUs.
        model: folder of a model, or the name of a size in `models.SIZES`.
        folder: for models and other files; removed at the end.
    """

    dry: bool
    model: str
    folder: Path

    def to_json(self) -> str:
        return json.dumps({"dry": self.dry, "model": self.model, "folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str) -> Settings:
        read = json.loads(text)
        return cls(read["dry"], read["model"], Path(read["folder"]))

    @property
    def dtype(self) -> str:
        """`model.dtype` of the checks: CPUs compute bfloat16 too, but the engine's kernels there do not gain by it."""
        return "float32" if self.dry else "bfloat16"

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"


def cards() -> int:
    """Number of CUDA GPUs that PyTorch sees in this process."""
    import torch

    return torch.cuda.device_count()
