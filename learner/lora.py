"""Low-rank adapters (LoRA, arXiv 2106.09685) of a policy, by peft.

Invariants
- Only the adapters train. Without them the policy is the model that it was loaded from: its own reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from learner.policy import Policy
from services.config.tree import LoraConfig
from services.errors import ModelUnavailable
from services.weights.adapter import A, B

_SUFFIXES = {".lora_A.default.weight": A, ".lora_B.default.weight": B}


def adapt(policy: Policy, config: LoraConfig) -> None:
    """Add adapters to the policy and freeze the rest.

    Raises:
        ModelUnavailable: the model has no layer of a configured name.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it by r, whatever it is
        lora_dropout=0.0,
        target_modules=list(config.targets),
    )
    try:
        inject_adapter_in_model(settings, policy.lm)
    except ValueError as error:
        raise ModelUnavailable(f"model.lora: {' '.join(str(error).split())[:200]}") from error


def broadcast(parameters: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The adapters' parameters, by peft's names, in the form of `services.weights.adapter`."""
    tensors = {}
    for name, tensor in parameters.items():
        for suffix, ours in _SUFFIXES.items():
            if name.endswith(suffix):
                scaled = tensor * (config.alpha / config.rank) if ours == B else tensor
                tensors[f"{name.removesuffix(suffix)}.weight{ours}"] = scaled
    return tensors


@contextmanager
def switched_off(policy: Policy) -> Iterator[None]:
    """The policy without its adapters."""
    layers = list(_layers(policy))
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _layers(policy: Policy) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in policy.modules() if isinstance(module, BaseTunerLayer))
