"""The judgement of a rank: wrong gradients, steps, restored states and amounts of memory fail, right ones do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anchorage.planning.plan import GIB
from benchmarks.gpu_check import learner
from learner.rank.shards import ShardWriter
from services.config.tree import Config

CONFIG = Config.model_validate({"optimizer": {"lr": 1e-3, "weight_decay": 0.01}})
Tensors = dict[str, Tensor]


def tensors(seed: int, spread: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: spread * torch.randn(200, 10, generator=generator) for name in ("a", "b")}


def plus(one: Tensors, other: Tensors, factor: float) -> Tensors:
    return {name: one[name] + factor * other[name] for name in one}


def gradient_failures(found: Tensors, norm_factor: float = 1.0) -> set[str]:
    exact = tensors(0)
    rounded = plus(exact, tensors(1), 0.02)
    norm = norm_factor * math.sqrt(sum(float(tensor.square().sum()) for tensor in exact.values()))
    rows = learner.judge_gradient(found, rounded, exact, norm)
    return {row.name.split(", ")[1] for row in rows if row.verdict == "failed"}


def test_a_gradient_may_be_off_by_rounding_and_no_more() -> None:
    exact = tensors(0)
    assert not gradient_failures(exact)
    assert not gradient_failures(plus(exact, tensors(2), 0.03))
    assert not gradient_failures({name: 0.1 * tensor for name, tensor in exact.items()})  # clipped
    assert gradient_failures(plus(exact, tensors(2), 0.1)) == {"1 − cosine"}
    assert gradient_failures({"a": exact["a"]}) == {"1 − cosine"}
    assert gradient_failures({name: -tensor for name, tensor in exact.items()}) == {"1 − cosine"}
    assert gradient_failures(exact, 2.0) == {"norm"}
    assert gradient_failures({name: tensor * math.nan for name, tensor in exact.items()}) == {"1 − cosine"}


def adamw_step(**settings: float) -> learner.Step:
    """A step that PyTorch's AdamW makes, of weights that bfloat16 can represent."""
    before = {name: tensor.to(torch.bfloat16).float() for name, tensor in tensors(3, 0.05).items()}
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in before.items()}
    used = {"lr": 1e-3, "weight_decay": 0.01} | settings
    optimizer = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.999), **used)  # type: ignore[arg-type]
    for name, gradient in tensors(4, 1e-3).items():
        parameters[name].grad = gradient
    optimizer.step()
    state = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    return learner.Step(
        before={name: tensor.to(torch.bfloat16) for name, tensor in before.items()},
        after={name: parameter.detach() for name, parameter in parameters.items()},
        mean={name: each["exp_avg"] for name, each in state.items()},
        square={name: each["exp_avg_sq"] for name, each in state.items()},
    )


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        (lambda step: step, "ok"),
        (lambda step: replace(step, after=step.before), "failed"),
        (lambda step: replace(step, after={n: t.to(torch.bfloat16) for n, t in step.after.items()}), "failed"),
        (lambda step: replace(step, mean={n: -t for n, t in step.mean.items()}), "failed"),
        (lambda step: adamw_step(weight_decay=10.0), "failed"),
        (lambda step: adamw_step(lr=1.1e-3), "failed"),
        (lambda step: replace(step, after={n: t * math.nan for n, t in step.after.items()}), "failed"),
    ],
    ids=["right", "not made", "masters in bfloat16", "upwards", "another decay", "another rate", "not a number"],
)
def test_a_step_must_be_adamw_s(wrong: Callable[[learner.Step], learner.Step], verdict: str) -> None:
    assert learner.judge_step(wrong(adamw_step()), CONFIG).verdict == verdict


def stored(folder: Path, found: Tensors) -> Path:
    folder.mkdir()
    writer = ShardWriter(folder)
    for name, tensor in found.items():
        writer.add(name, tensor)
    writer.flush()
    return folder


def test_a_state_that_is_not_restored_to_the_bit_shows(tmp_path: Path) -> None:
    whole = tensors(5)
    first = stored(tmp_path / "first", whole)
    assert learner.stored_difference(first, stored(tmp_path / "same", whole)) == 0.0
    rounded = whole | {"b": whole["b"].to(torch.bfloat16).float()}
    assert learner.stored_difference(first, stored(tmp_path / "rounded", rounded)) > 0
    assert learner.stored_difference(first, stored(tmp_path / "part", {"a": whole["a"]})) == math.inf
    assert learner.stored_difference(first, stored(tmp_path / "nan", whole | {"b": whole["b"] * math.nan})) == math.inf


@pytest.mark.parametrize(
    ("peak", "verdict"), [(1.0, "ok"), (0.75, "ok"), (1.04, "ok"), (1.06, "failed"), (0.5, "failed")]
)
def test_memory_is_compared_with_the_plan(peak: float, verdict: str) -> None:
    planned = 20 * GIB
    assert [row.verdict for row in learner.judge_memory(int(peak * planned), planned)] == ["measured", verdict]


@pytest.mark.parametrize("room", [1, 2, 5, 8, 13, 31, 64])
def test_the_largest_size_is_found_within_a_sixteenth_of_its_half(room: int) -> None:
    tried: list[int] = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= 100 * room

    found = learner.largest_that_fits(fits, 100, 10**9)
    assert found is not None
    assert 0 <= 100 * room - found <= 100 * max(0, room // 16)
    assert len(tried) <= 12
    assert learner.largest_that_fits(lambda tokens: False, 100, 10**9) is None
    assert learner.largest_that_fits(lambda tokens: True, 100, 850) == 800


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA GH200 480GB", 989.0),
    ],
)
def test_peaks_of_known_cards(name: str, peak: float) -> None:
    assert learner.peak_of(name) == ("as stated", peak)
