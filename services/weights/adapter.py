"""Low-rank adapters as a policy version: what is broadcast in place of a whole model, and how it becomes one again.

An adapter of the weight `N`, as `N` is called and laid out on disk, is two tensors, `N.lora_B` [rows, r] and
`N.lora_A` [r, columns]: the weight that it makes is N + B · A. The scale, such as alpha / rank, is part of B. Where the
learner holds a weight in another form than the disk does (parts joined or permuted), the adapter is what is added
itself, `N.lora_delta`.

Invariants
- The sum is taken in float32 and rounded once, to the adapter's type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from services.weights.channel import WeightsCorrupt

if TYPE_CHECKING:
    import torch

A, B, DELTA = ".lora_A", ".lora_B", ".lora_delta"


def is_adapter(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensors are adapters, not a whole model."""
    return bool(tensors) and all(name.endswith((A, B, DELTA)) for name in tensors)


def merged(adapter: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole model: `base` with the adapters added, in the adapters' type.

    Raises:
        WeightsCorrupt: the adapters do not fit the base model.
    """
    dtype = next(iter(adapter.values())).dtype
    names = {name.removesuffix(A).removesuffix(DELTA) for name in adapter if not name.endswith(B)}
    if strange := sorted(names - base.keys()):
        raise WeightsCorrupt(f"the adapters are of another model: model.path has no {strange[0]}")
    model = {}
    for name, weight in base.items():
        if name in names:
            model[name] = (weight.float() + _delta(name, adapter, weight.shape)).to(dtype)
        else:
            model[name] = weight.to(dtype) if weight.is_floating_point() else weight
    return model


def _delta(name: str, adapter: Mapping[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """float32, what is added to the weight `name`."""
    whole = adapter.get(name + DELTA)
    delta = adapter[name + B].float() @ adapter[name + A].float() if whole is None else whole.float()
    if delta.shape != shape:
        raise WeightsCorrupt(f"the adapter of {name} makes {tuple(delta.shape)}, the weight is {tuple(shape)}")
    return delta
