"""Causal attention over packed sequences, as an attention function of transformers.

A micro-batch is one line of tokens that holds many sequences. Each sequence has its own tokens, which are the queries,
and a path, which gives keys and values: the tokens that it shares with sequences before it, then its own.

Invariants
- No token attends to a token of another sequence, except along its path; nothing is padded.
- No argument of a layer is ignored: it is honoured (scale, sliding window), or the model is refused here and its rows
  go through the model's own forward pass.
- The result does not depend on what else is in the line.

Example: sequence A `a b c d e`, and B `a b c x y`, which shares `a b c` with it (`learner.batching._pack`). A dot: the
query attends to the key. B's queries are two, its keys five.

    place in the line   0 1 2 3 4 5 6        A       a b c d e        B       a b c x y   along its path
    token               a b c d e x y        a       .                x       . . . .
                                             b       . .              y       . . . . .
    A: starts 0 5, path 0 1 2 3 4            c       . . .
    B: starts 5 7, path 0 1 2 5 6            d       . . . .
                                             e       . . . . .
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
"""Arguments of attention functions whose values never change what a packed line attends to."""


class PackingUnsupported(Exception):
    """The model cannot run on packed lines; the message is the reason, as part of a sentence about the model."""


@dataclass(frozen=True)
class Layout:
    """Where the S sequences lie in a line of L tokens.

    Attributes:
        starts: int32 [S + 1], bounds of the sequences' own tokens in the line.
        path_starts: int32 [S + 1], bounds of the sequences' paths in `path`.
        path: int64, places in the line of the tokens that each sequence reads, sequence after sequence; None: each
            reads only its own tokens.
        own: largest number of own tokens of a sequence.
        read: length of the longest path.
        bounds: `starts` as plain numbers.
        path_bounds: `path_starts` as plain numbers.
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
        """Build the layout from the arrays of a micro-batch, see `learner.batching.MicroBatch`."""
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
    """Attend along the paths of a packed line; transformers calls this in each layer.

    Args:
        module: the attention layer.
        query: [1, H, L, D].
        key: [1, G, L, D], with G dividing H.
        value: [1, G, L, D].
        attention_mask: must be None.
        layout: where the sequences lie; passed through the model's forward pass.
        scaling: factor of the scores; None: 1 / sqrt(D).
        sliding_window: number of tokens that each attends to, itself included; None: all before it.
        others: further arguments of the layer, which must ask for nothing.

    Returns:
        [1, L, H, D], and None in place of the attention weights.

    Raises:
        PackingUnsupported: the layer needs something that is not implemented here.
    """
    _refuse_others(module, attention_mask, others)
    if layout is None:
        raise PackingUnsupported("the model does not pass arguments on to its attention layers")
    window = sliding_window if sliding_window is not None and sliding_window < layout.read else None
    if layout.path is not None:
        # Not key[:, :, path]: its backward pass, a scatter with duplicates, is far slower.
        key, value = key.index_select(2, layout.path), value.index_select(2, layout.path)
    if query.is_cuda and query.dtype in FLASH_DTYPES:
        return _flash(query, key, value, layout, scaling, window), None
    return _each_alone(query, key, value, layout, scaling, window), None


def _refuse_others(module: torch.nn.Module, attention_mask: Tensor | None, others: dict[str, object]) -> None:
    """Raise PackingUnsupported unless all further arguments change nothing: one that is ignored is a wrong result."""
    if attention_mask is not None:
        raise PackingUnsupported("its attention layers take a mask of the model's own")
    if others.pop("is_causal", None) is False or getattr(module, "is_causal", True) is False:
        raise PackingUnsupported("its attention is not causal")
    for name, value in others.items():
        # None, False and 0.0 switch something off.
        if name not in NEUTRAL and not (value is None or (isinstance(value, bool | int | float) and not value)):
            raise PackingUnsupported(f"its attention has {name}")


def _flash(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, window: int | None
) -> Tensor:
    """PyTorch's flash attention, all sequences in one kernel. As `packed_attention`; key and value along the paths."""
    from torch.nn.attention.varlen import varlen_attn

    # Its causal mask is aligned at the end: the last own token reads the whole path.
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
    """Scaled dot-product attention, one sequence after the other. Shapes as `_flash`."""
    parts = []
    for (start, end), (first, last) in zip(pairwise(layout.bounds), pairwise(layout.path_bounds), strict=True):
        own, read = end - start, last - first
        whole = own == read and (window is None or read <= window)
        mask = None
        if not whole:
            mask = torch.ones(own, read, dtype=torch.bool, device=query.device).tril_(read - own)
            # A window of w tokens includes the token itself.
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
    """Register the function with transformers in this process; returns its name. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME
