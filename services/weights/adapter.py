"""Low-rank adapters as a policy version: what is broadcast in place of a whole model, and how it becomes one again.

An adapter of the weight `N` is two tensors, `N.lora_A` [r, in] and `N.lora_B` [out, r]; the weight that it makes is
N + B · A. The scale alpha / rank is part of B.

Invariants
- The sum is taken in float32 and rounded once, to the adapter's type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from services.weights.channel import WeightsCorrupt

if TYPE_CHECKING:
    import torch

A, B = ".lora_A", ".lora_B"


def is_adapter(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensors are adapters, not a whole model."""
    return bool(tensors) and all(name.endswith((A, B)) for name in tensors)


def merged(adapter: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole model: `base` with the adapters added, in the adapters' type.

    Raises:
        WeightsCorrupt: the adapters do not fit the base model.
    """
    dtype = next(iter(adapter.values())).dtype
    names = {name.removesuffix(A) for name in adapter if name.endswith(A)}
    if strange := sorted(names - base.keys()):
        raise WeightsCorrupt(f"the adapters are of another model: model.path has no {strange[0]}")
    model = {}
    for name, weight in base.items():
        if name in names:
            model[name] = (weight.float() + adapter[name + B].float() @ adapter[name + A].float()).to(dtype)
        else:
            model[name] = weight.to(dtype)
    return model
