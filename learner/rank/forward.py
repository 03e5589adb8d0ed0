"""The forward pass of a causal language model in two halves: the body (hidden states) and the head (logits).

The head is whatever the model's own forward does after its body: projection, logit scales, soft caps. It is the model's
own code: the body's place is taken by a stand-in that returns hidden states that were computed before. So the head runs
on chosen positions, in pieces, and again in the backward pass, without a second run of the body.

Invariants
- Nothing here knows an architecture by name.
- The model stays in evaluation mode, in training too: no dropout, no router noise, no skipped layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class _StandIn(nn.Module):
    """Returns what the body returned before. Everything else that is read of it is the body's."""

    def __init__(self, body: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["body"] = body  # not a submodule: it already is one of the model
        self.__dict__["output"] = output

    def __getattr__(self, name: str) -> Any:
        # OPT's forward calls the decoder inside of its body.
        return self if name == "decoder" else getattr(self.__dict__["body"], name)

    def forward(self, *_: object, **__: object) -> Any:
        return self.__dict__["output"]


class Forward:
    """The two halves of `lm`, a causal language model of transformers."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return int(self.lm.config.get_text_config().vocab_size)

    def body(self, input_ids: Tensor, **more: Any) -> Any:
        """The output of the body, which has `last_hidden_state` [B, L, H]; int64 `input_ids` [B, L]."""
        return self.lm._modules[self._body](input_ids=input_ids, **self._without_cache, **more)

    def head(self, output: Any, hidden: Tensor) -> Tensor:
        """Logits [T, V] of hidden states [T, H]; `output` is a body's, for what else is in it."""
        filled = type(output)(**{**output, "last_hidden_state": hidden[None]})
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with self._standing_in(filled):
            logits: Tensor = self.lm(input_ids=ids, **self._without_cache).logits
        return logits[0]

    def whole(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [B, P, V] of the model's own forward pass, undivided; at `positions`, int64 [P], none: at all."""
        accepts = "logits_to_keep" in inspect.signature(self.lm.forward).parameters
        keep = {"logits_to_keep": positions} if positions is not None and accepts else {}
        logits: Tensor = self.lm(input_ids=input_ids, **self._without_cache, **keep).logits
        return logits if positions is None or accepts else logits[:, positions]

    @contextmanager
    def _standing_in(self, output: Any) -> Iterator[None]:
        body = self.lm._modules[self._body]
        self.lm._modules[self._body] = _StandIn(body, output)
        try:
            yield
        finally:
            self.lm._modules[self._body] = body

    @cached_property
    def _body(self) -> str:
        """Name of the body among the model's parts. Raises ValueError where it has none of its own."""
        from transformers import PreTrainedModel

        if self.lm.base_model_prefix in self.lm._modules:
            return str(self.lm.base_model_prefix)
        # Llama 4's prefix is that of the model with pictures.
        inner = [name for name, part in self.lm._modules.items() if isinstance(part, PreTrainedModel)]
        if len(inner) != 1:
            raise ValueError("its body cannot be told from its head")
        return str(inner[0])

    @cached_property
    def _without_cache(self) -> dict[str, bool]:
        accepted = inspect.signature(self.lm.forward).parameters
        return {"use_cache": False} if "use_cache" in accepted or "kwargs" in accepted else {}


def recompute_layers(lm: Any) -> None:
    """Keep each layer's input only and compute the layer again in the backward pass (activation checkpointing).

    transformers does so in training mode only, which the model is never in.
    """
    for layer in _layers(lm):
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _layers(lm: Any) -> list[Any]:
    """The repeated layers: those that transformers knows as such, else the members of the longest list of modules."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    known = {name: module for name, module in lm.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    outer = [m for name, m in known.items() if not any(name.startswith(f"{other}.") for other in known)]
    lists = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
    return outer or list(max(lists, key=len, default=[]))
