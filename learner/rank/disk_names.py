"""What a model's weights are called in a checkpoint on disk, and how they lie there.

transformers may hold weights in another form than the folder does: names with or without a prefix, experts fused into
one tensor, parts concatenated or permuted. vLLM, the actors and every exported folder use the form on disk.

Invariants
- Names and layout are those of `save_pretrained`, by transformers' own record of how the folder was converted when it
  was loaded; nothing here knows an architecture.
- A tied weight has every name that the folder gives it, and one where the folder gives it none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from services.errors import ModelUnavailable, first_line
from services.model_folder import tensor_shapes


class DiskForm:
    """The form on disk of one loaded model. Made while its parameters are whole (before ZeRO shards them).

    Raises:
        ModelUnavailable: the model has weights that the folder has not, or in another shape.

    Example: of a Qwen3-MoE with two layers of four experts, `model.layers.0.mlp.experts.gate_up_proj` [4, 2 I, H]
    becomes `model.layers.0.mlp.experts.0.gate_proj.weight` [I, H] and seven more.
    """

    def __init__(self, lm: Any, folder: Path) -> None:
        self._lm = lm
        self._aliases = _aliases(lm)
        self._folder = tensor_shapes(folder)
        shapes = {name: tensor.to("meta") for name, tensor in weights_of(lm).items()}
        self._check(self.published(shapes), folder)

    def published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All of the model's weights, by its own names, in the form on disk. Parts may be views of what came in."""
        whole = dict(tensors)
        tied: dict[int, list[str]] = {}
        for name, others in self._aliases.items():
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
        """Some of the weights, by the model's own names; what is only renamed is the same object.

        The other members of a converted group (a layer's experts) must be among them.

        Raises:
            ModelUnavailable: transformers cannot undo its conversion.
        """
        return {self._as_in_folder(name): tensor for name, tensor in on_disk(self._lm, tensors).items()}

    def _as_in_folder(self, name: str) -> str:
        """A folder may leave out the prefix of the model's body, as GPT-2's of the hub does; transformers adds it."""
        prefix = f"{self._lm.base_model_prefix}."
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        return other if name not in self._folder and other in self._folder else name

    def _check(self, found: Mapping[str, Tensor], folder: Path) -> None:
        if not self._folder:
            return  # weights in another format than safetensors
        for name, tensor in sorted(found.items()):
            if name not in self._folder:
                raise ModelUnavailable(f"model.path {folder} has no {name}, which the model's weights are saved as")
            if self._folder[name] != tuple(tensor.shape):
                raise ModelUnavailable(
                    f"model.path {folder}: {name} has shape {self._folder[name]}, the model's is {tuple(tensor.shape)}"
                )


def weights_of(lm: Any) -> dict[str, Tensor]:
    """Parameters, tied ones under their first name, and persistent buffers, by the model's own names."""
    return {name: parameter.detach() for name, parameter in lm.named_parameters()} | persistent_buffers(lm)


def persistent_buffers(lm: Any) -> dict[str, Tensor]:
    """Buffers that belong to a checkpoint, such as the correction biases of a router, by the model's own names."""
    found: dict[str, Tensor] = {}
    for prefix, module in lm.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[name] = buffer
    return found


def on_disk(lm: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, by the model's own names, in the form on disk. The model's own weights are not read.

    Raises:
        ModelUnavailable: transformers cannot undo its conversion.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        reverted: dict[str, Tensor] = revert_weight_conversion(lm, dict(tensors))
    except Exception as error:  # its conversions raise whatever a wrong shape or name ends in
        raise ModelUnavailable(
            f"model.path: transformers cannot write {type(lm).__name__} as it is on disk: {first_line(error)[:200]}"
        ) from error
    return reverted


def _aliases(lm: Any) -> dict[str, tuple[str, ...]]:
    """The further names of each tied parameter, by its first; `named_parameters` gives the first only."""
    first = {id(parameter): name for name, parameter in lm.named_parameters()}
    found: dict[str, list[str]] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        if first[id(parameter)] != name:
            found.setdefault(first[id(parameter)], []).append(name)
    return {name: tuple(names) for name, names in found.items()}
