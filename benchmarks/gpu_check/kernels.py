"""Kernels: one of Triton's, and the learner's packed attention with its gradients.

Packed attention is compared with scaled dot-product attention over each whole sequence alone, in float64. How far that
may be off is measured, too: by the same attention over each sequence alone, in the dtype of the kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_check.rows import Row, at_most, failed, holds, measured, skipped
from benchmarks.gpu_check.settings import CARD_NEEDED, Settings, cards
from learner.batching import Row as Sequence
from learner.batching import plan
from learner.rank.attention import Layout, packed_attention

SOFTMAX_BOUND = 1e-5
COMPILE_S = 300.0
CAPABILITIES = (80, 90, 100)
"""Compute capabilities of A100, H100 and B200, times ten."""
ROUNDING = 3.0
"""An error may be this many times that of attention over each sequence alone in the same dtype."""
FLOOR = 1e-6
OPENING = 48
"""Tokens that sequences share, where they do; `learner.batching` shares 32 or more."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Result [L, H, D], and the gradients of queries [1, H, L, D], keys and values [1, G, L, D]."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values as above to the result [L, H, D]."""


@dataclass(frozen=True, slots=True)
class Case:
    """An attention layer and a line of sequences.

    Attributes:
        heads: of queries.
        kv_heads: of keys and values.
        head: width of a head.
        shared: whether the sequences share beginnings.
        window: of a sliding window; None: all tokens before.
    """

    heads: int
    kv_heads: int
    head: int
    shared: bool = False
    window: int | None = None

    @property
    def name(self) -> str:
        more = (", shared beginnings" if self.shared else "") + (f", window of {self.window}" if self.window else "")
        grouped = f", {self.heads} heads on {self.kv_heads}" if self.heads != self.kv_heads else ""
        return f"attention, heads of {self.head}{grouped}{more}"


CASES = (
    Case(4, 4, 64),
    Case(14, 2, 64, shared=True),
    Case(4, 4, 128),
    Case(12, 2, 128, shared=True),
    Case(12, 2, 128, shared=True, window=40),
)
LENGTHS = (200, 77, 131, 260, 64, 33)
DRY_LENGTHS = (70, 50, 64, 33)


def triton(settings: Settings) -> Iterator[Row]:
    """A kernel compiled at its first use, against PyTorch. With `--dry` Triton's interpreter runs it."""
    if find_spec("triton") is None:
        yield (skipped if settings.dry else failed)("Triton kernel", "Triton is not installed")
        return
    if not settings.dry and not cards():
        yield skipped("Triton kernel", CARD_NEEDED)
        return
    if settings.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.gpu_check.triton_kernel import softmax

    source = torch.randn(64, 1000, device=settings.device, generator=_generator(settings.device))
    began = time.perf_counter()
    yield judge_softmax(source, softmax)
    yield measured("Triton kernel, first use, s", time.perf_counter() - began)


def triton_compiler(settings: Settings) -> Iterator[Row]:
    """A kernel compiled for several cards, which needs none of them."""
    if find_spec("triton") is None:
        yield (skipped if settings.dry else failed)("Triton's compiler", "Triton is not installed")
        return
    command = [sys.executable, "-m", "benchmarks.gpu_check.triton_kernel", *map(str, CAPABILITIES)]
    variables = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(settings.folder / "triton-cache")}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=COMPILE_S)
    yield from judge_compiled(done.returncode, done.stdout, done.stderr)


def judge_compiled(code: int, output: str, errors: str) -> Iterator[Row]:
    """Judge what the process that compiles left: its exit code, its standard output, and its standard error."""
    name = "Triton's compiler, capability"
    if code:
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        yield failed(f"{name}s", lines[-1][:300] if lines else f"exit code {code}")
        return
    for capability, size in zip(CAPABILITIES, json.loads(output), strict=True):
        yield holds(f"{name} {capability / 10:g}, bytes", size, size > 0, "machine code")


def judge_softmax(source: Tensor, softmax: Callable[[Tensor], Tensor]) -> Row:
    """Compare a softmax with PyTorch's: the largest difference."""
    off = (softmax(source) - source.softmax(-1)).abs().max()
    return at_most("Triton kernel, largest error", float(off), SOFTMAX_BOUND)


def attention(settings: Settings) -> Iterator[Row]:
    """The learner's packed attention."""
    if not settings.dry and not cards():
        yield skipped("attention", CARD_NEEDED)
        return
    dtype = torch.float32 if settings.dry else torch.bfloat16
    for case in CASES:
        line = Line(case, DRY_LENGTHS if settings.dry else LENGTHS, settings.device)
        yield from judge(line, line.packed, dtype)


class Line:
    """Random queries, keys and values of a packed line, and attention over it in two ways.

    Args:
        case: the layer.
        lengths: of the sequences.
        device: where.
    """

    def __init__(self, case: Case, lengths: tuple[int, ...], device: str) -> None:
        self.case = case
        random = np.random.default_rng(len(lengths))
        opening = random.integers(0, 1000, OPENING if case.shared else 0)
        texts = [np.concatenate([opening, random.integers(0, 1000, length)]).astype(np.int32) for length in lengths]
        ((batch,),) = plan([Sequence(text, np.zeros(1, np.float32), 1.0) for text in texts], 1, 10**6)
        self._device = torch.device(device)
        self.layout = Layout.of(batch.starts, batch.path_starts, batch.path, self._device)
        self._path = torch.tensor(batch.path, device=self._device)
        generator = _generator(device)

        def draw(heads: int) -> Tensor:
            size = (1, heads, batch.tokens, case.head)
            return torch.randn(size, device=device, generator=generator, dtype=torch.float64)

        self.inputs = draw(case.heads), draw(case.kv_heads), draw(case.kv_heads)
        self.weight = draw(case.heads)[0].transpose(0, 1)

    def gradients(self, attend: Attend, dtype: torch.dtype) -> Gradients:
        """Run attention and its backward pass on the line in `dtype`; return all results in float64."""
        # Of numbers that the lower precision represents exactly: only the arithmetic differs.
        leaves = [tensor.to(torch.bfloat16).to(dtype).requires_grad_() for tensor in self.inputs]
        result = attend(*leaves)
        torch.autograd.backward(result, self.weight.to(torch.bfloat16).to(dtype))
        gradients = [leaf.grad for leaf in leaves]
        one, two, three = (torch.zeros(()) if grad is None else grad.double() for grad in gradients)
        return result.detach().double(), one, two, three

    def packed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As the learner's layers call it."""
        module: Any = SimpleNamespace(is_causal=True)
        result, _ = packed_attention(
            module, query, key, value, None, layout=self.layout, sliding_window=self.case.window
        )
        return result[0]

    def alone(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each whole sequence alone, of which its own tokens are kept."""
        parts = []
        bounds = zip(pairwise(self.layout.bounds), pairwise(self.layout.path_bounds), strict=True)
        for (start, end), (first, last) in bounds:
            path = self._path[first:last]
            mask = None if self.case.window is None else _window(len(path), self.case.window, self._device)
            whole = scaled_dot_product_attention(
                query[:, :, path],
                key[:, :, path],
                value[:, :, path],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=self.case.heads != self.case.kv_heads,
            )
            parts.append(whole[0, :, start - end :].transpose(0, 1))
        return torch.cat(parts)


def judge(line: Line, attend: Attend, dtype: torch.dtype) -> Iterator[Row]:
    """Compare `attend` in `dtype` with attention over each sequence alone in float64.

    Relative errors of the result and of each gradient, and the largest of a single token: a leak between sequences may
    change few of them.
    """
    exact = line.gradients(line.alone, torch.float64)
    rounded = line.gradients(line.alone, dtype)
    found = line.gradients(attend, dtype)
    for name, one, other, wanted in zip(("result", "dq", "dk", "dv"), found, rounded, exact, strict=True):
        bound = FLOOR + ROUNDING * _relative(other, wanted)
        yield at_most(f"{line.case.name}: {name}", _relative(one, wanted), bound)
    bound = FLOOR + ROUNDING * _worst(rounded[0], exact[0])
    yield at_most(f"{line.case.name}: worst token", _worst(found[0], exact[0]), bound)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _worst(found: Tensor, wanted: Tensor) -> float:
    """Largest relative error of one token's result, of [L, H, D]."""
    return float(((found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).max())


def _window(length: int, window: int, device: torch.device) -> Tensor:
    whole = torch.ones(length, length, dtype=torch.bool, device=device)
    return whole.tril().triu(1 - window)


def _generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(5)


CHECKS = (triton_compiler, triton, attention)
