"""A Triton kernel: softmax of the rows of a matrix. Imported only where Triton is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor


def _softmax(out: Any, source: Any, columns: Any, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0)
    places = tl.arange(0, BLOCK)
    inside = places < columns
    values = tl.load(source + row * columns + places, mask=inside, other=-float("inf"))
    values = tl.exp(values - tl.max(values, axis=0))
    tl.store(out + row * columns + places, values / tl.sum(values, axis=0), mask=inside)


_kernel = triton.jit(_softmax)


def softmax(source: Tensor) -> Tensor:
    """Softmax over the columns of a float32 matrix."""
    out = source.new_empty(source.shape)
    rows, columns = source.shape
    _kernel[(rows,)](out, source, columns, BLOCK=triton.next_power_of_2(columns))
    return out
