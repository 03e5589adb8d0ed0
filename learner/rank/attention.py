"""Causal attention over packed sequences, as an attention function of transformers.

A micro-batch is one line of tokens that holds many sequences. Each has its own tokens, which ask, and reads a path:
the tokens that it shares with sequences before it in the line, then its own.

Invariants
- No token reads one of another sequence, except along its path; nothing is padded.
- No argument of a layer is dropped: it is honoured (scale, sliding window), or the model is refused here and its rows
  go through the model's own forward.
- The result does not depend on what else is in the line.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "anchorage_packed"
FLASH_DTYPES = (torch.bfloat16, torch.float16)
NEUTRAL = frozenset({"position_ids", "cache_position", "return_dict"})
"""Arguments of attention functions that do not change what a packed line attends to, whatever they are."""


class PackingUnsupported(Exception):
    """The model cannot be run on packed lines; the message says why, as part of a sentence about the model."""


@dataclass(frozen=True)
class Layout:
    """Where the sequences lie in a line of L tokens.

    Attributes:
        starts: int32 [S + 1], bounds of the sequences' own tokens in the line. path_starts: of their paths in `path`.
        path: int64, places in the line of the tokens that each sequence reads, sequence after sequence; None: each
            reads its own tokens only.
        own / read: longest sequence's own tokens, and longest path.
        bounds / path_bounds: `starts` and `path_starts` as plain numbers.
    """

    starts: Tensor
    path_starts: Tensor
    path: Tensor | None
    own: int
    read: int
    bounds: tuple[int, ...]
    path_bounds: tuple[int, ...]

    @classmethod
    def of(cls, starts: Any, path_starts: Any, path: Any, device: torch.device) -> Layout:
        """Made of the arrays of a micro-batch."""
        shared = len(path) > starts[-1]
        return cls(
            starts=torch.tensor(starts, dtype=torch.int32, device=device),
            path_starts=torch.tensor(path_starts, dtype=torch.int32, device=device),
            path=torch.tensor(path, dtype=torch.int64, device=device) if shared else None,
            own=int((starts[1:] - starts[:-1]).max()),
            read=int((path_starts[1:] - path_starts[:-1]).max()),
            bounds=tuple(starts.tolist()),
            path_bounds=tuple(path_starts.tolist()),
        )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: query [1, H, L, D], key and value [1, G, L, D] to [1, L, H, D].

    Raises:
        PackingUnsupported: the layer asks for something that is not done here.
    """
    _refuse_others(module, attention_mask, others)
    if layout is None:
        raise PackingUnsupported("the model does not pass arguments on to its attention layers")
    window = sliding_window if sliding_window is not None and sliding_window < layout.read else None
    if layout.path is not None:
        # Not by brackets: their backward pass is far slower.
        key, value = key.index_select(2, layout.path), value.index_select(2, layout.path)
    if query.is_cuda and query.dtype in FLASH_DTYPES:
        return _flash(query, key, value, layout, scaling, window), None
    return _each_alone(query, key, value, layout, scaling, window), None


def _refuse_others(module: torch.nn.Module, attention_mask: Tensor | None, others: dict[str, object]) -> None:
    """Raise unless all arguments are those that change nothing here: a dropped one is a wrong number."""
    if attention_mask is not None:
        raise PackingUnsupported("its attention layers take a mask of the model's own")
    if others.pop("is_causal", None) is False or getattr(module, "is_causal", True) is False:
        raise PackingUnsupported("its attention is not causal")
    for name, value in others.items():
        # None, False and 0.0 ask for nothing.
        if name not in NEUTRAL and not (value is None or (isinstance(value, bool | int | float) and not value)):
            raise PackingUnsupported(f"its attention has {name}")


def _flash(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, window: int | None
) -> Tensor:
    """Flash attention of PyTorch: all sequences in one kernel."""
    from torch.nn.attention.varlen import varlen_attn

    # Causal from the end: the last own token reads the whole path.
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layout.starts,
        layout.path_starts,
        layout.own,
        layout.read,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(out, Tensor)
    return out[None]


def _each_alone(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, window: int | None
) -> Tensor:
    parts = []
    for (start, end), (first, last) in zip(pairwise(layout.bounds), pairwise(layout.path_bounds), strict=True):
        own, read = end - start, last - first
        whole = own == read and (window is None or read <= window)
        mask = None
        if not whole:
            mask = torch.ones(own, read, dtype=torch.bool, device=query.device).tril_(read - own)
            # A window counts the token itself.
            mask = mask if window is None else mask.triu_(read - own - window + 1)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, first:last],
                value[:, :, first:last],
                attn_mask=mask,
                is_causal=whole,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            ).transpose(1, 2)
        )
    return torch.cat(parts, dim=1)


def register() -> str:
    """Make the function known to transformers in this process; its name. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME
