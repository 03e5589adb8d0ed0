"""Names and layout of a model's weights on disk.

transformers may hold weights in another form than the folder does: names with or without a prefix, experts fused into
one tensor, parts concatenated or permuted. vLLM, the actors and every exported folder use the form on disk.

Invariants
- Names and layout are those of `save_pretrained`, according to transformers' own record of how it converted the folder
  on loading; nothing here depends on the architecture.
- A tied weight has every name that the folder gives it, or one name if the folder gives it none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.errors import ModelUnavailable, first_line
from services.model_folder import tensor_shapes

_LAYER = re.compile(r".*?\.\d+\.")


class DiskForm:
    """Converts the weights of one loaded model to their form on disk.

    Must be constructed while the parameters are whole, that is before ZeRO shards them.

    Args:
        lm: the model, as transformers loaded it.
        folder: that it was loaded from.

    Attributes:
        parts: the model's own names of its weights, in parts for `published`.

    Raises:
        ModelUnavailable: the model has weights that the folder lacks, or has in another shape.

    Example: in a Qwen3-MoE with two layers of four experts, `model.layers.0.mlp.experts.gate_up_proj` [4, 2 I, H]
    becomes `model.layers.0.mlp.experts.0.gate_proj.weight` [I, H] and seven more.
    """

    def __init__(self, lm: Any, folder: Path) -> None:
        self._lm = lm
        self._aliases = _aliases(lm)
        self._folder = tensor_shapes(folder)
        self._forms = {name: tensor.to("meta") for name, tensor in weights_of(lm).items()}
        whole = self.published(self._forms)
        self._check(whole, folder)
        self.parts = self._parts(whole)

    def form(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What `published` makes of all weights, with the parameters in `dtype`, as tensors on the meta device."""
        parameters = {name for name, _ in self._lm.named_parameters()}
        forms = {name: form.to(dtype) if name in parameters else form for name, form in self._forms.items()}
        return self.published(forms)

    def published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert all of the model's weights, or those of one of `parts`, given by its own names.

        Results may be views of the input.
        """
        whole = dict(tensors)
        tied: dict[int, list[str]] = {}
        for name, others in self._aliases.items():
            if name not in whole:
                continue
            tied[id(whole[name])] = []
            whole |= dict.fromkeys(others, whole[name])
        found = self.convert(whole)
        for name, tensor in found.items():
            if id(tensor) in tied:
                tied[id(tensor)].append(name)
        for names in tied.values():
            kept = [name for name in names if name in self._folder] or names[:1]
            for name in set(names) - set(kept):
                del found[name]
        return found

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert some weights, given by the model's own names. A tensor that is only renamed stays the same object.

        All members of a group that is converted together, such as a layer's experts, must be given.

        Raises:
            ModelUnavailable: transformers cannot undo its conversion.
        """
        return {self._as_in_folder(name): tensor for name, tensor in on_disk(self._lm, tensors).items()}

    def _parts(self, whole: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
        """The model's names, in parts that can be converted one by one: its layers, and the rest.

        Example: `model.embed_tokens.weight`, `model.layers.0.mlp.up_proj.weight`, `model.layers.0.mlp.down_proj.weight`
        and `lm_head.weight` are two parts, the second and third name being one of them.
        """
        parts: dict[str, list[str]] = {}
        for name in self._forms:
            layer = _LAYER.match(name)
            parts.setdefault(layer[0] if layer else "", []).append(name)
        found: dict[str, Tensor] = {}
        with suppress(ModelUnavailable):
            for names in parts.values():
                found |= self.published({name: self._forms[name] for name in names})
        if {name: form.shape for name, form in found.items()} != {name: form.shape for name, form in whole.items()}:
            return (tuple(self._forms),)  # a conversion goes across layers
        return tuple(map(tuple, parts.values()))

    def _as_in_folder(self, name: str) -> str:
        """Name in the folder, which may lack the prefix of the model's body that transformers adds, as GPT-2's does."""
        prefix = f"{self._lm.base_model_prefix}."
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        return other if name not in self._folder and other in self._folder else name

    def _check(self, found: Mapping[str, Tensor], folder: Path) -> None:
        """Raise ModelUnavailable unless the folder has all converted weights, in the same shapes."""
        if not self._folder:
            return  # the weights are in another format than safetensors
        for name, tensor in sorted(found.items()):
            if name not in self._folder:
                raise ModelUnavailable(f"model.path {folder}: the weights files lack {name}, which the model has")
            if self._folder[name] != tuple(tensor.shape):
                raise ModelUnavailable(
                    f"model.path {folder}: {name} has shape {self._folder[name]}, the model needs {tuple(tensor.shape)}"
                )


def weights_of(lm: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the model's own names; a tied parameter under its first name only."""
    return {name: parameter.detach() for name, parameter in lm.named_parameters()} | persistent_buffers(lm)


def persistent_buffers(lm: Any) -> dict[str, Tensor]:
    """Buffers that are part of a checkpoint, such as a router's correction biases, by the model's own names."""
    found: dict[str, Tensor] = {}
    for prefix, module in lm.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[name] = buffer
    return found


def on_disk(lm: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors, given by the model's own names, to their form on disk. Does not read the model's own weights.

    Raises:
        ModelUnavailable: transformers cannot undo its conversion.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        reverted: dict[str, Tensor] = revert_weight_conversion(lm, dict(tensors))
    except Exception as error:  # depends on the conversion
        raise ModelUnavailable(
            f"model.path: transformers cannot convert {type(lm).__name__} for the disk: {first_line(error)[:200]}"
        ) from error
    return reverted


def _aliases(lm: Any) -> dict[str, tuple[str, ...]]:
    """Further names of each tied parameter, by its first, which is the only one that `named_parameters` gives."""
    first = {id(parameter): name for name, parameter in lm.named_parameters()}
    found: dict[str, list[str]] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        if first[id(parameter)] != name:
            found.setdefault(first[id(parameter)], []).append(name)
    return {name: tuple(names) for name, names in found.items()}
