"""A larger policy that plays exactly like another: its MLPs are widened with neurons of zero weight.

The cost around a model is the same for every model. The starter policy is so small that this cost dominates; a larger
model that plays the same episodes, token by token, shows how much of the time it takes at an ordinary size.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from services.model_folder import read_weights


def widen(folder: Path, to: Path, width: int) -> int:
    """Copy a model with gated MLPs to a new folder, widened to `width` neurons; return its number of parameters."""
    from safetensors.torch import save_file
    from torch.nn.functional import pad

    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    facts = json.loads((folder / "config.json").read_text())
    more = width - int(facts["intermediate_size"])
    (to / "config.json").write_text(json.dumps(facts | {"intermediate_size": width}))
    tensors = read_weights(folder)
    for name, tensor in tensors.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensors[name] = pad(tensor, (0, 0, 0, more))
        elif name.endswith("down_proj.weight"):
            tensors[name] = pad(tensor, (0, more))
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())
