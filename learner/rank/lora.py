"""Low-rank adapters (LoRA, arXiv:2106.09685) of a policy, by peft.

Invariants
- Only the adapters train. Without them the policy is the model that it was loaded from, hence its own reference.
- Only a layer that the forward pass calls gets an adapter: a fused kernel that reads the layer's weight directly would
  leave the adapter out. One forward pass shows which layers are called.
- Merging the broadcast adapter into the base weight gives the same layer as the one that trains; each layer is compared
  when its adapter is created.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learner.rank.attention import Layout
from learner.rank.disk_names import DiskForm
from learner.rank.policy import Policy
from services.config.tree import LoraConfig
from services.errors import ModelUnavailable, first_line
from services.weights.adapter import DELTA, A, B

log = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
LARGEST_ERROR = {torch.float32: 1e-4}
"""By dtype, of a merged layer's output, relative to its largest absolute value; in other dtypes `ROUNDED`."""
ROUNDED = 0.05


class Adapters:
    """The adapters of one policy.

    Args:
        policy: with adapters injected.
        disk: form on disk of its model.

    Attributes:
        layers: the adapted layers by the model's own names.

    Raises:
        ModelUnavailable: an adapter, merged, would make another layer than the one that trains.
    """

    def __init__(self, policy: Policy, disk: DiskForm) -> None:
        self._disk = disk
        self.layers = {name: layer for name, layer in policy.lm.named_modules() if _is_adapted(layer)}
        # A weight that is at most renamed on disk is broadcast as two thin factors, any other as their product.
        self._names = {name: self._name_on_disk(name, layer) for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            _require_same(name, layer)

    def broadcast(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the adapters' parameters to the form of `services.weights.adapter`.

        Args:
            parameters: by peft's names.

        Returns:
            By the names on disk: two factors B and A of each layer, or their product where the weight's layout differs.
        """
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            down, up = (parameters[f"{name}.lora_{kind}.default.weight"] for kind in "AB")
            first, second = _factors(layer, down, up)
            disk = self._names[name]
            if disk is not None:
                tensors |= {disk + B: first, disk + A: second}
            else:
                parts = self._disk.convert({f"{name}.weight": (first.float() @ second.float()).to(up.dtype)})
                tensors |= {part + DELTA: delta for part, delta in parts.items()}
        return tensors

    def _name_on_disk(self, name: str, layer: Any) -> str | None:
        """Name of a layer's weight on disk; None if its layout differs there too."""
        weight = layer.get_base_layer().weight.to("meta")
        found = self._disk.convert({f"{name}.weight": weight})
        return next((disk for disk, tensor in found.items() if tensor is weight), None)


def _factors(layer: Any, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Scale an adapter and orient it so that the product of its factors has the layout of the layer's weight.

    Args:
        layer: the adapted layer.
        down: A, [r, in].
        up: B, [out, r].

    Returns:
        Factors [out, r] and [r, in] of a linear layer's weight [out, in]; [in, r] and [r, out] of a Conv1D's [in, out].

    Example: r = 1, alpha = 2, so the scale is 2; A = [1 0], B = [3 4]ᵀ.

        factors   [6 8]ᵀ and [1 0]
        product   6 0      merged weight = base weight + product, and the layer computes W x + 2 B (A x)
                  8 0
    """
    scaled = up * layer.scaling["default"]
    # GPT-2 stores its weights transposed: W + (B A)ᵀ.
    return (down.T, scaled.T) if layer.fan_in_fan_out else (scaled, down)


@torch.no_grad()
def _require_same(name: str, layer: Any) -> None:
    """Raise ModelUnavailable unless the layer, with a random adapter, equals one into which it is merged."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    # B starts at 0, so a wrong merge would not show: it is replaced for the comparison.
    kept, generator = up.detach().clone(), torch.Generator().manual_seed(0)
    up.copy_(torch.randn(up.shape, generator=generator) / up.shape[1])
    merged = copy.deepcopy(layer.get_base_layer())
    first, second = _factors(layer, down, up)
    merged.weight.add_((first.float() @ second.float()).to(merged.weight.dtype))
    inputs = torch.randn(4, down.shape[1], generator=generator).to(down.device, merged.weight.dtype)
    ours, theirs = layer(inputs).float(), merged(inputs).float()
    up.copy_(kept)
    off = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
    if not off <= LARGEST_ERROR.get(merged.weight.dtype, ROUNDED):
        raise ModelUnavailable(
            f"model.lora: {name} with its adapter merged is another layer (relative error {off:.2g}); "
            "leave it out of model.lora.targets"
        )


def adapt(policy: Policy, config: LoraConfig, disk: DiskForm) -> Adapters:
    """Add adapters to the policy and freeze all other parameters.

    Args:
        policy: changed in place.
        config: rank, scale and targets.
        disk: form on disk of the policy's model.

    Raises:
        ModelUnavailable: a target matches no layer, or one that cannot have an adapter.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it by r, whatever it is
        lora_dropout=0.0,
        target_modules=[f"lm.{name}" for name in target_layers(policy, config.targets)],
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about transposed layers, which peft detects itself
            # Not into `policy.lm`: in a model of transformers peft takes `gate_proj` for the fused experts.
            inject_adapter_in_model(settings, policy)
    except ValueError as error:
        raise ModelUnavailable(f"model.lora: {' '.join(str(error).split())[:200]}") from error
    return Adapters(policy, disk)


def check_targets(folder: Path, targets: Sequence[str]) -> None:
    """Check targets against a model's layers without loading its weights, in seconds.

    The layers are those of the model that `config.json` describes, built on PyTorch's meta device. A layer that only a
    forward pass shows to be unfit is found later, by `adapt`. So is whatever else is wrong with the folder.

    Args:
        folder: of the model.
        targets: `model.lora.targets`.

    Raises:
        ModelUnavailable: a target matches no layer, or one that is not a linear layer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # depends on the architecture; the ranks report it with its cause
        log.info("cannot check model.lora.targets before the start: %s", first_line(error))
        return
    _matching(lm, targets, list(_linear_layers(lm)))


def target_layers(policy: Policy, targets: Sequence[str]) -> list[str]:
    """Names of the layers to adapt.

    Args:
        policy: the model.
        targets: each `all-linear`, for every layer of `adaptable_layers`, or the end of layers' names.

    Raises:
        ModelUnavailable: a target matches no layer, or one that cannot have an adapter.
    """
    return _matching(policy.lm, targets, adaptable_layers(policy))


def _matching(lm: Any, targets: Sequence[str], possible: Sequence[str]) -> list[str]:
    """Names that the targets match, in the order of the targets; each must be among `possible`.

    Example: in a model of two layers `down_proj` matches `model.layers.0.mlp.down_proj` and
    `model.layers.1.mlp.down_proj`; `1.mlp.down_proj` matches the second; `proj` matches none.
    """
    if not possible:
        raise ModelUnavailable(f"model.lora: {type(lm).__name__} has no linear layers that can have adapters")
    chosen: dict[str, None] = {}
    for target in targets:
        if target == ALL_LINEAR:
            chosen |= dict.fromkeys(possible)
            continue
        matching = [name for name, _ in lm.named_modules() if name == target or name.endswith(f".{target}")]
        unfit = [name for name in matching if name not in possible]
        if not matching or unfit:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in possible}))
            why = f"{unfit[0]} cannot have an adapter" if unfit else f"no layer is called {target}"
            raise ModelUnavailable(f"model.lora.targets: {why}; {type(lm).__name__} has {ends} (or all-linear)")
        chosen |= dict.fromkeys(matching)
    return list(chosen)


def adaptable_layers(policy: Policy) -> list[str]:
    """Names of the linear layers, except the head and routed experts, that a forward pass calls as linear layers.

    A router whose class is a linear layer but which returns its choice (Phi-MoE, Llama 4) is not one of them.
    """
    linear = _linear_layers(policy.lm)
    called: dict[str, bool] = {}

    def note(name: str, output: object) -> None:
        called[name] = called.get(name, True) and isinstance(output, Tensor)

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in linear.items()
    ]
    try:
        _call(policy)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in linear if called.get(name)]


def _linear_layers(lm: Any) -> dict[str, nn.Module]:
    """The linear layers by name, except the head, a tied embedding, routed experts and those that peft refuses."""
    from transformers.pytorch_utils import Conv1D

    head = lm.get_output_embeddings()
    tied = {id(lm.get_input_embeddings().weight)}
    return {
        name: module
        for name, module in lm.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and id(module.weight) not in tied
        and "experts" not in name.split(".")
        and _peft_takes(lm, name)
    }


@torch.no_grad()
def _call(policy: Policy) -> None:
    """Run one forward pass over one row of four tokens."""
    device = next(policy.parameters()).device
    bounds, places = np.array([0, 4]), torch.arange(4, device=device)
    layout = Layout.of(bounds, bounds, np.arange(4), device)
    policy(places[None], places[None], places[2:3], places[3:], layout, 1)


@contextmanager
def switched_off(policy: Policy) -> Iterator[None]:
    """A context in which the policy runs without its adapters."""
    layers: list[Any] = [module for module in policy.modules() if _is_adapted(module)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _is_adapted(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _peft_takes(lm: Any, name: str) -> bool:
    """Whether peft accepts the layer; it refuses those whose weight a kernel reads directly."""
    from peft import LoraConfig as PeftConfig
    from peft.tuners import tuners_utils

    try:
        tuners_utils._check_lora_target_modules_mamba(PeftConfig(), lm, name.rpartition(".")[2])
    except ValueError:
        return False
    return True
