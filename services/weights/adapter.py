"""Low-rank adapters as a policy version: broadcast instead of a whole model, and added to the base model on arrival.

An adapter of the weight `N` (name and layout as on disk) consists of two tensors, `N.lora_B` [rows, r] and `N.lora_A`
[r, columns]; the resulting weight is N + B · A. The scale, such as alpha / rank, is part of B. If the learner holds a
weight in another layout than the disk (parts joined or permuted), the adapter is the product itself, `N.lora_delta`.

Invariants
- The sum is computed in float32 and rounded once, to the adapter's dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from services.weights.errors import WeightsCorrupt

if TYPE_CHECKING:
    import torch

A, B, DELTA = ".lora_A", ".lora_B", ".lora_delta"


def is_adapter(names: Collection[str]) -> bool:
    """Whether tensors of these names are adapters, not a whole model."""
    return bool(names) and all(name.endswith((A, B, DELTA)) for name in names)


def merged(adapter: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole model in the adapters' dtype: `base` with the adapters added. Raises WeightsCorrupt as `merging`."""
    return dict(merging(adapter, base))


def merging(
    adapter: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `merged`, tensor by tensor, on the adapters' device.

    Raises:
        WeightsCorrupt: the adapters do not fit the base model.
    """
    some = next(iter(adapter.values()))
    dtype, device = some.dtype, some.device
    names = {name.removesuffix(A).removesuffix(DELTA) for name in adapter if not name.endswith(B)}
    if strange := sorted(names - base.keys()):
        raise WeightsCorrupt(f"adapters of another model: model.path has no {strange[0]}")
    for name, stored in base.items():
        weight = stored.to(device)
        if name in names:
            yield name, (weight.float() + _delta(name, adapter, weight.shape)).to(dtype)
        else:
            yield name, weight.to(dtype) if weight.is_floating_point() else weight


def merged_form(adapter: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dtypes and shapes of `merged`, as tensors on the meta device."""
    dtype = next(iter(adapter.values())).dtype
    forms = {name: weight.to("meta") for name, weight in base.items()}
    return {name: form.to(dtype) if form.is_floating_point() else form for name, form in forms.items()}


def _delta(name: str, adapter: Mapping[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """The float32 tensor that is added to the weight `name`."""
    whole = adapter.get(name + DELTA)
    delta = adapter[name + B].float() @ adapter[name + A].float() if whole is None else whole.float()
    if delta.shape != shape:
        raise WeightsCorrupt(f"shape of the adapter of {name} is {tuple(delta.shape)}, of the weight {tuple(shape)}")
    return delta
