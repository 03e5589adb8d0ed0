"""Forward pass of a causal language model in two halves: the body (hidden states) and the head (logits).

The head is whatever the model's own forward pass does after its body: projection, logit scales, soft caps. The model's
own code runs it, with a stand-in in the body's place that returns hidden states computed before. So the head can run on
selected positions, in pieces, and again in the backward pass, without running the body a second time.

Example: a row of 1,000 tokens whose last 20 are the response, in a model with a vocabulary of 150,000.

    body(ids)                   hidden states [1, 1000, H], once
    hidden[0, 979:999]          the 20 positions that predict the response
    head(output, hidden)        lm(zeros[1, 20]) with its body replaced by a stand-in that returns these 20 hidden
                                states: logits [20, 150000] instead of [1000, 150000]

Invariants
- Nothing here depends on the architecture.
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
    """Takes the body's place and returns a given output. All other attributes are the body's."""

    def __init__(self, body: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["body"] = body  # not as a submodule: it already is one of the model
        self.__dict__["output"] = output

    def __getattr__(self, name: str) -> Any:
        # OPT's forward pass calls the decoder inside its body.
        return self if name == "decoder" else getattr(self.__dict__["body"], name)

    def forward(self, *_: object, **__: object) -> Any:
        return self.__dict__["output"]


class Forward:
    """Both halves of a model.

    Attributes:
        lm: a causal language model of transformers.
    """

    def __init__(self, lm: Any) -> None:
        self.lm = lm

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return int(self.lm.config.get_text_config().vocab_size)

    def body(self, input_ids: Tensor, **more: Any) -> Any:
        """Run the body.

        Args:
            input_ids: int64 [B, L].
            more: further arguments of the body.

        Returns:
            The body's output; its `last_hidden_state` is [B, L, H].
        """
        return self.lm._modules[self._body](input_ids=input_ids, **self._without_cache, **more)

    def head(self, output: Any, hidden: Tensor) -> Tensor:
        """Run the head on selected hidden states.

        Args:
            output: of `body`, for whatever else the head reads in it.
            hidden: [T, H], from its `last_hidden_state`.

        Returns:
            Logits [T, V].
        """
        # Token ids of the right number: some models derive positions or masks from their shape.
        filled = type(output)(**{**output, "last_hidden_state": hidden[None]})
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with self._standing_in(filled):
            logits: Tensor = self.lm(input_ids=ids, **self._without_cache).logits
        return logits[0]

    def whole(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Run the model's own forward pass, undivided.

        Args:
            input_ids: int64 [B, L].
            positions: int64 [P], places to return logits of; None: all.

        Returns:
            Logits [B, P, V].
        """
        accepts = "logits_to_keep" in inspect.signature(self.lm.forward).parameters
        keep = {"logits_to_keep": positions} if positions is not None and accepts else {}
        logits: Tensor = self.lm(input_ids=input_ids, **self._without_cache, **keep).logits
        return logits if positions is None or accepts else logits[:, positions]

    @contextmanager
    def _standing_in(self, output: Any) -> Iterator[None]:
        """A context in which the body returns `output` without computing anything."""
        body = self.lm._modules[self._body]
        self.lm._modules[self._body] = _StandIn(body, output)
        try:
            yield
        finally:
            self.lm._modules[self._body] = body

    @cached_property
    def _body(self) -> str:
        """Name of the body among the model's children. Raises ValueError if it has no separate body."""
        from transformers import PreTrainedModel

        if self.lm.base_model_prefix in self.lm._modules:
            return str(self.lm.base_model_prefix)
        # Llama 4's prefix is that of the multimodal model.
        inner = [name for name, part in self.lm._modules.items() if isinstance(part, PreTrainedModel)]
        if len(inner) != 1:
            raise ValueError("its body cannot be separated from its head")
        return str(inner[0])

    @cached_property
    def _without_cache(self) -> dict[str, bool]:
        accepted = inspect.signature(self.lm.forward).parameters
        return {"use_cache": False} if "use_cache" in accepted or "kwargs" in accepted else {}


def recompute_layers(lm: Any) -> None:
    """Keep only each layer's input and recompute the layer in the backward pass (activation checkpointing).

    transformers' own implementation works in training mode only, which the model is never in.
    """
    for layer in _layers(lm):
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _layers(lm: Any) -> list[Any]:
    """The repeated layers: those that transformers marks as such, else the members of the longest list of modules."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    known = {name: module for name, module in lm.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    outer = [m for name, m in known.items() if not any(name.startswith(f"{other}.") for other in known)]
    lists = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
    return outer or list(max(lists, key=len, default=[]))
