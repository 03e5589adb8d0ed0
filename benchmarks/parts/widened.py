"""A policy that plays as another does, at the cost of a larger model: its MLPs widened with neurons of zero weight.

What surrounds a model costs the same for every model. The starter policy is so small that on it little else is seen;
beside one of ordinary size the same episodes, token for token, show what is left of it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from services.model_folder import read_weights


def widen(folder: Path, to: Path, width: int) -> int:
    """Copy a model with gated MLPs, `width` neurons in each, to a new folder; returns its number of parameters."""
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
