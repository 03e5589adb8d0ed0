"""A Triton kernel: softmax of the rows of a matrix. Imported only where Triton is installed.

`python -m benchmarks.gpu_check.triton_kernel CAPABILITY …` prints the bytes of its machine code for each, as JSON. It
has a process of its own: whether Triton's own functions are compiled or interpreted is decided at their import.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if TYPE_CHECKING:
    from torch import Tensor

WARP = 32
_BLOCK = 1024


# Triton evaluates annotations within its own language: it knows none of Python's types.
def _softmax(out, source, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    places = tl.arange(0, BLOCK)
    inside = places < columns
    values = tl.load(source + row * columns + places, mask=inside, other=-float("inf"))
    values = tl.exp(values - tl.max(values, axis=0))
    tl.store(out + row * columns + places, values / tl.sum(values, axis=0), mask=inside)


def softmax(source: Tensor) -> Tensor:
    """Softmax over the columns of a float32 matrix."""
    kernel: Any = triton.jit(_softmax)
    out = source.new_empty(source.shape)
    rows, columns = source.shape
    kernel[(rows,)](out, source, columns, BLOCK=triton.next_power_of_2(columns))
    return out


def machine_code(capability: int) -> int:
    """Bytes of the kernel's machine code for a compute capability, such as 90. Needs no card."""
    types = {"out": "*fp32", "source": "*fp32", "columns": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=triton.jit(_softmax), signature=types, constexprs={(3,): _BLOCK})
    return len(triton.compile(source, target=GPUTarget("cuda", capability, WARP)).asm["cubin"])


if __name__ == "__main__":
    print(json.dumps([machine_code(int(capability)) for capability in sys.argv[1:]]))
