"""The judgement of kernels: the right ones pass, and wrong ones of every kind do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_check import kernels
from benchmarks.gpu_check.kernels import CASES, DRY_LENGTHS, Case, Line

SHARED = Case(4, 2, 64, shared=True)


def failed(line: Line, attend: kernels.Attend, dtype: torch.dtype = torch.float32) -> set[str]:
    rows = list(kernels.judge(line, attend, dtype))
    assert len(rows) == 5
    return {row.name.rpartition(": ")[2] for row in rows if row.verdict == "failed"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_learner_s_attention_passes(case: Case, dtype: torch.dtype) -> None:
    line = Line(case, DRY_LENGTHS, "cpu")
    assert (line.layout.path is not None) is case.shared
    assert not failed(line, line.packed, dtype)


def leaking(line: Line) -> kernels.Attend:
    """The first sequence's last token is read by the second: only the second's tokens are wrong."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = line.packed(query, key, value)
        place = line.layout.bounds[1]
        stray = torch.zeros_like(result)
        stray[place] = value[0, :, place - 1].repeat_interleave(query.shape[1] // value.shape[1], 0)
        return result + 0.2 * stray

    return attend


def unmasked(line: Line) -> kernels.Attend:
    """Without the causal mask."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)[0].transpose(0, 1)

    return attend


def without_paths(line: Line) -> kernels.Attend:
    """Shared beginnings are ignored."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kept = line.layout
        line.layout = replace(kept, path=None, path_starts=kept.starts, path_bounds=kept.bounds, read=kept.own)
        try:
            return line.packed(query, key, value)
        finally:
            line.layout = kept

    return attend


def scaled(line: Line) -> kernels.Attend:
    """With another scale of the scores, by 2 %."""
    return lambda query, key, value: line.packed(query * 1.02, key, value)


@pytest.mark.parametrize("wrong", [leaking, unmasked, without_paths, scaled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_result_fails(wrong: Callable[[Line], kernels.Attend], dtype: torch.dtype) -> None:
    line = Line(SHARED, DRY_LENGTHS, "cpu")
    assert {"result", "worst token"} & failed(line, wrong(line), dtype)


def test_a_wrong_gradient_of_a_right_result_fails() -> None:
    line = Line(SHARED, DRY_LENGTHS, "cpu")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        right = line.packed(query, key, value)
        return right + (line.packed(query, key.detach(), value) - right.detach()) * 0.1 - 0.1 * (right - right.detach())

    result = line.gradients(attend, torch.float32)[0]
    assert torch.allclose(result, line.gradients(line.packed, torch.float32)[0], atol=1e-5)
    assert failed(line, attend) >= {"dk"}


def test_a_window_that_is_ignored_fails() -> None:
    line = Line(Case(4, 2, 64, window=20), DRY_LENGTHS, "cpu")
    assert not failed(line, line.packed)
    without = Line(Case(4, 2, 64), DRY_LENGTHS, "cpu")
    assert failed(line, without.packed) >= {"result", "dq", "dk", "dv"}


def test_a_wrong_softmax_fails() -> None:
    source = torch.randn(8, 100)
    assert kernels.judge_softmax(source, lambda some: some.softmax(-1)).verdict == "ok"
    assert kernels.judge_softmax(source, lambda some: some.softmax(-1) * 1.001).verdict == "failed"
    assert kernels.judge_softmax(source, lambda some: some.softmax(0)).verdict == "failed"


def test_a_compiler_that_fails_is_told_in_one_line() -> None:
    right = [row.verdict for row in kernels.judge_compiled(0, "[14048, 14736, 18776]", "")]
    assert right == ["ok", "ok", "ok"]
    assert "failed" in [row.verdict for row in kernels.judge_compiled(0, "[14048, 0, 18776]", "")]
    (row,) = kernels.judge_compiled(1, "", "Traceback\n  File …\nRuntimeError: Failed to find C compiler.\n")
    assert (row.verdict, row.reason) == ("failed", "RuntimeError: Failed to find C compiler.")
