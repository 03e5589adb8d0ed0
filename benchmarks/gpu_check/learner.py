"""One rank of the learner in bfloat16, in a ZeRO stage: gradient, optimizer step, speed, memory, resume.

Invariants
- A gradient is compared with that of the same rows in float32. How far it may be off is measured, too: by the gradient
  of the model's own forward pass in bfloat16, without DeepSpeed and without packing.
"""

from __future__ import annotations

import gc
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anchorage.planning.assumptions import Assumptions
from anchorage.planning.plan import GIB, Cards, make_plan
from anchorage.planning.shapes import Shape, shape_of
from benchmarks.gpu_check.machine import product_tflops
from benchmarks.gpu_check.models import folder_of
from benchmarks.gpu_check.rows import Row, at_least, at_most, between, failed, measured, skipped
from benchmarks.gpu_check.settings import CARD_NEEDED, Settings, cards
from benchmarks.parts import updates
from learner.prepare import OptimizerStep, prepare
from learner.rank.engine_deepspeed import DeepSpeedEngine, connect
from learner.rank.policy import Policy, Route, inputs, load_policy
from learner.rank.shards import ShardReader
from services.config.tree import Config
from services.process import ReservedPort

RATE, EPSILON = 1e-3, 1e-8
ROUNDING = 3.0
"""A gradient's distance from the float32 one may be this many times that of the model's own pass in bfloat16."""
STEP_BOUND = 0.01
"""Of the learning rate: the error of an optimizer step."""
MEMORY = 0.7, 1.05
"""Measured peak over planned. Above, a run that should fit would not; below, cards are left empty."""
REPEATS, DRY_REPEATS = 5, 1
DRY_TOKENS, MOST_TOKENS = 1024, 2**20
PEAKS = (
    *(("H200", 989.0), ("GH200", 989.0), ("H100 PCIe", 756.0), ("H100", 989.0), ("B200", 2250.0), ("A100", 312.0)),
    *(
        ("A800", 312.0),
        ("L40S", 362.0),
        ("L40", 181.0),
        ("L4", 121.0),
        ("A10G", 70.0),
        ("A10", 125.0),
        ("RTX 4090", 165.0),
        ("RTX 3090", 71.0),
    ),
)
"""Dense bfloat16 peaks in TFLOPS by the beginning or a part of a card's name, as their vendor states them."""


class Learner:
    """A rank in one ZeRO stage, and the update that it makes."""

    def __init__(self, settings: Settings, stage: int) -> None:
        self.settings = settings
        self.stage = stage
        self.folder = folder_of(settings)
        self.prompt, self.response = (48, 16) if settings.dry else (896, 128)
        self.context = self.prompt + self.response
        self.shape = shape_of(self.folder)
        self.scratch = settings.folder / f"zero-{stage}"
        self.scratch.mkdir(exist_ok=True)
        with ReservedPort("127.0.0.1") as port:
            connect(0, 1, "127.0.0.1", port.number)

    @cached_property
    def config(self) -> Config:
        return self.configured(8 * self.context)

    def configured(self, tokens: int, algorithm: str = "gigpo") -> Config:
        """Return the configuration with micro-batches of so many tokens."""
        model = {"path": self.folder, "dtype": "bfloat16"}
        lengths = {"max_prompt_tokens": self.prompt, "max_response_tokens": self.response}
        tree: dict[str, Any] = {
            "algorithm": algorithm,
            "model": model | lengths,
            "learner": {"zero_stage": self.stage, "microbatch_tokens": tokens},
            "loss": {"kl_coef": 0.0, "importance_cap": None},
            "optimizer": {"lr": RATE, "weight_decay": 0.01},
        }
        return Config.model_validate(tree)

    def engine(self) -> DeepSpeedEngine:
        """A new engine with the folder's weights."""
        gc.collect()
        if cards():
            torch.cuda.empty_cache()
        return DeepSpeedEngine(self.config)

    @cached_property
    def first(self) -> DeepSpeedEngine:
        """The engine that all checks share."""
        return self.engine()

    @cached_property
    def step(self) -> OptimizerStep:
        """Rows of the longest length, so that micro-batches are as large as a plan assumes."""
        groups = updates.made_up_groups(
            1 if self.settings.dry else 2,
            np.random.default_rng(0),
            self.shape.vocabulary,
            prompt=(self.prompt, self.prompt + 1),
            response=(self.response, self.response + 1),
            steps=(2, 3) if self.settings.dry else (4, 5),
        )
        ((step,),) = prepare(groups, self.config, 0).work
        return step


@dataclass(frozen=True, slots=True)
class Step:
    """Masters before and after an optimizer step, and the optimizer's moments after it, by parameter."""

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    mean: Mapping[str, Tensor]
    square: Mapping[str, Tensor]


def gradient(learner: Learner) -> Iterator[Row]:
    """The gradient of an update against float32, the optimizer step, and which AdamW makes it."""
    exact_policy = load_policy(learner.folder, "float32", 1.0, route=Route(packed=False)).to(learner.settings.device)
    learner.step = with_own_logprobs(learner.step, exact_policy)
    exact = plain_gradient(exact_policy, learner.step, learner.config)
    weights = {name: parameter.detach().cpu() for name, parameter in exact_policy.lm.named_parameters()}
    del exact_policy
    rounded_policy = load_policy(learner.folder, "bfloat16", 1.0, route=Route(packed=False)).to(learner.settings.device)
    rounded = plain_gradient(rounded_policy, learner.step, learner.config)
    del rounded_policy
    engine = learner.first
    yield measured("packed rows", "yes" if engine.parity.route.packed else f"no: {'; '.join(engine.parity.reasons)}")
    yield measured("optimizer", engine.optimizer_name)
    figures = updates.apply(engine, learner.config, learner.step)
    folder = saved(engine, learner.scratch / "first")
    stored = ShardReader(folder)
    of = {kind: {name: stored.get(f"{kind}/{name}") for name in exact} for kind in ("master", "exp_avg", "exp_avg_sq")}
    first_beta = 1 - learner.config.optimizer.betas[0]
    found = {name: moment / first_beta for name, moment in of["exp_avg"].items()}
    yield from judge_gradient(found, rounded, exact, figures["grad_norm"])
    yield judge_step(Step(weights, of["master"], of["exp_avg"], of["exp_avg_sq"]), learner.config)
    shutil.rmtree(folder)


def with_own_logprobs(step: OptimizerStep, policy: Policy) -> OptimizerStep:
    """The step with the policy's own log-probabilities as the sampler's: no ratio is clipped."""
    device = next(policy.parameters()).device
    with torch.no_grad():
        scored = [policy(*inputs(batch, device))[0].cpu().numpy() for batch in step.batches]
    batches = [replace(batch, behaviour=own) for batch, own in zip(step.batches, scored, strict=True)]
    return replace(step, batches=batches)


def plain_gradient(policy: Policy, step: OptimizerStep, config: Config) -> dict[str, Tensor]:
    """The gradient by autograd alone, float32 on the CPU by parameter."""
    device = next(policy.parameters()).device
    sums: dict[str, Tensor] = {}
    for batch in step.batches:
        terms = updates.loss_of(batch, config, step.total_tokens, *policy(*inputs(batch, device)))
        torch.autograd.backward(terms.loss)
        for name, parameter in policy.lm.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, torch.zeros(())) + parameter.grad.float().cpu()
                parameter.grad = None
    return sums


def judge_gradient(
    found: Mapping[str, Tensor], rounded: Mapping[str, Tensor], exact: Mapping[str, Tensor], norm: float
) -> Iterator[Row]:
    """Compare a gradient with the exact one.

    Args:
        found: the optimizer's, after clipping: only its direction counts.
        rounded: of the model's own forward pass in the lower precision.
        exact: in float32.
        norm: of the found one before clipping.
    """
    off, allowed = 1 - _cosine(found, exact), 1 - _cosine(rounded, exact)
    yield at_most("gradient against float32, 1 − cosine", off, ROUNDING * allowed + 1e-6)
    # The angle between the two allows this much for their lengths, too.
    wanted = _norm(exact)
    bound = ROUNDING * math.sqrt(2 * max(0.0, allowed)) + 1e-3
    yield at_most("gradient against float32, norm, relative error", abs(norm / wanted - 1), bound)


def judge_step(step: Step, config: Config) -> Row:
    """Compare the first step of AdamW with its formula (Loshchilov and Hutter, arXiv 1711.05101): the largest error."""
    optimizer = config.optimizer
    first, second = optimizer.betas
    largest = 0.0
    for name, before in step.before.items():
        if name not in step.after:
            continue
        mean, square = step.mean[name] / (1 - first), step.square[name] / (1 - second)
        wanted = before.float() * (1 - optimizer.lr * optimizer.weight_decay)
        wanted = wanted - optimizer.lr * mean / (square.sqrt() + EPSILON)
        # Of numbers in float32: what they round to does not count.
        rounding = before.float().abs() * 2**-22
        off = ((step.after[name] - wanted).abs() - rounding).nan_to_num(math.inf).max()
        largest = max(largest, float(off) / optimizer.lr)
    return at_most("optimizer step against AdamW's formula, error in learning rates", largest, STEP_BOUND)


def _cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    product = sum(float((one[name].double() * other[name].double()).sum()) for name in other if name in one)
    return product / (_norm(one) * _norm(other) + 1e-300)


def _norm(one: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in one.values()))


def resume(learner: Learner) -> Iterator[Row]:
    """Save, restore in a new engine, and make the next update: the same state, and the same update."""
    engine, folder = learner.first, learner.scratch
    updates.apply(engine, learner.config, learner.step)
    needed, free = 2 * engine.checkpoint_bytes(), shutil.disk_usage(folder).free
    if free < needed:
        yield skipped("resume", f"needs {needed / GIB:,.1f} GiB for checkpoints, {free / GIB:,.1f} are free (--folder)")
        return
    stored = saved(engine, folder / "stored")
    batch = learner.step.batches[0]
    before = engine.logprobs(batch).cpu()
    again = learner.engine()
    again.load(stored)
    yield at_most("restored log-probabilities, difference", largest_difference(again.logprobs(batch), before), 0.0)
    yield at_most("restored state, difference", stored_difference(stored, saved(again, folder / "restored")), 0.0)
    steps = [_next(engine, learner, batch)]
    for _ in range(2):
        again.load(stored)
        steps.append(_next(again, learner, batch))
    # The backward pass of flash attention adds in no fixed order: the same update twice shows how much that is.
    noise = largest_difference(steps[1], steps[2])
    yield measured("next update, repeated, difference", noise)
    yield at_most("next update after a resume, difference", largest_difference(steps[0], steps[1]), 4 * noise)
    for written in (stored, folder / "restored"):
        shutil.rmtree(written)


def _next(engine: DeepSpeedEngine, learner: Learner, batch: Any) -> Tensor:
    updates.apply(engine, learner.config, learner.step)
    return engine.logprobs(batch).cpu()


def saved(engine: DeepSpeedEngine, folder: Path) -> Path:
    """Write the engine's checkpoint; return its folder."""
    folder.mkdir(exist_ok=True)
    engine.save(folder)
    return folder


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; infinite where one is not a number."""
    return float((one.cpu() - other.cpu()).abs().nan_to_num(math.inf).max())


def stored_difference(one: Path, other: Path) -> float:
    """Largest difference between two checkpoints' tensors; infinite if they hold different ones."""
    first, second = ShardReader(one), ShardReader(other)
    if first.names != second.names or not first.names:
        return math.inf
    return max(largest_difference(first.get(name), second.get(name)) for name in first.names)


def speed(learner: Learner) -> Iterator[Row]:
    """Tokens a second, MFU, and the peak of memory beside the plan's."""
    engine, step = learner.first, learner.step
    updates.apply(engine, learner.config, step)
    if cards():
        torch.cuda.reset_peak_memory_stats()
    taken = [
        timed(partial(updates.apply, engine, learner.config, step))
        for _ in range(DRY_REPEATS if learner.settings.dry else REPEATS)
    ]
    seconds = statistics.median(taken)
    tokens = sum(batch.tokens for batch in step.batches)
    yield measured("tokens of an update", tokens)
    yield measured("tokens/s", tokens / seconds)
    planned = planned_bytes(learner.shape, learner.config, 80.0)
    yield measured("memory of a rank by the plan, GiB", planned / GIB)
    if not cards():
        yield skipped("MFU", CARD_NEEDED)
        yield skipped("peak memory over planned", f"{CARD_NEEDED}; memory of a CPU is not counted by its allocator")
        return
    name, peak = peak_of(torch.cuda.get_device_name())
    yield measured(
        f"MFU, of {peak:,.0f} TFLOPS ({name})", updates.flops(step.batches, learner.shape) / seconds / peak / 1e12
    )
    yield from judge_memory(torch.cuda.max_memory_allocated(), planned)


def timed(act: Callable[[], object]) -> float:
    """Seconds of a call with what it starts on the card."""
    began = time.perf_counter()
    act()
    if cards():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_of(name: str) -> tuple[str, float]:
    """Where a card's peak comes from, and TFLOPS: stated by the vendor, or measured where the card is not known."""
    stated = next((peak for known, peak in PEAKS if all(word in name for word in known.split())), None)
    return ("as stated", stated) if stated is not None else ("measured", product_tflops("cuda"))


def planned_bytes(shape: Shape, config: Config, gib: float) -> int:
    """What `anchorage plan` counts of a rank that shares no beginnings, without CUDA's own memory."""
    plan = make_plan(config, shape, Cards(1, gib), Assumptions().changed(["shared=0"]))
    return plan.rank_total - plan.rank["overhead"]


def judge_memory(peak: int, planned: int) -> Iterator[Row]:
    """Compare the allocator's peak with the plan's bytes."""
    yield measured("peak memory, GiB", peak / GIB)
    yield between("peak memory over planned", peak / planned, *MEMORY)


def largest(learner: Learner) -> Iterator[Row]:
    """The largest micro-batch before memory ends, beside the plan's."""
    engine = learner.first
    limit = DRY_TOKENS if learner.settings.dry else MOST_TOKENS

    def fits(tokens: int) -> bool:
        return one_pass(learner, engine, tokens)

    found = largest_that_fits(fits, learner.context, limit)
    if found is None:
        yield failed("largest micro-batch, tokens", f"not even one row of {learner.context} tokens fits")
        return
    if learner.settings.dry:
        yield skipped("largest micro-batch, tokens", f"{found} tokens fit, no more were tried: {CARD_NEEDED}")
        return
    yield measured("largest micro-batch, tokens", found)
    gib = torch.cuda.get_device_properties(0).total_memory / GIB
    planned = largest_planned(learner, gib, limit)
    yield measured("largest micro-batch by the plan, tokens", planned)
    yield at_least("largest micro-batch, measured over planned", found / max(1, planned), 1.0)


def largest_planned(learner: Learner, gib: float, limit: int) -> int:
    """Most tokens that the plan finds room for on a card of so many GiB."""
    assumed = Assumptions().changed(["shared=0"])

    def fits(tokens: int) -> bool:
        plan = make_plan(learner.configured(tokens), learner.shape, Cards(1, gib), assumed)
        return plan.rank_total <= plan.card

    return largest_that_fits(fits, learner.context, limit) or 0


def largest_that_fits(fits: Callable[[int], bool], unit: int, limit: int) -> int | None:
    """Largest multiple of `unit`, at most `limit`, that fits: doubled until one does not, then four times halved.

    Returns:
        None if not even one unit fits.
    """
    low, high = 0, None
    size = 1
    while size * unit <= limit and high is None:
        if fits(size * unit):
            low, size = size, 2 * size
        else:
            high = size
    for _ in range(4):
        if high is None or high - low <= 1:
            break
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    return low * unit or None


def one_pass(learner: Learner, engine: DeepSpeedEngine, tokens: int) -> bool:
    """Whether forward and backward pass of one micro-batch fit into memory."""
    config = learner.configured(tokens)
    count = tokens // learner.context
    groups = updates.made_up_groups(
        1,
        np.random.default_rng(count),
        learner.shape.vocabulary,
        prompt=(learner.prompt, learner.prompt + 1),
        response=(learner.response, learner.response + 1),
        steps=(count, count + 1),
        members=2,
    )
    ((step,),) = prepare(groups, config, 0).work
    batch = max(step.batches, key=lambda batch: batch.tokens)
    try:
        engine.accumulate(batch, partial(updates.loss_of, batch, config, step.total_tokens))
        if cards():
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        if cards():
            torch.cuda.empty_cache()
    return True


def _in_stage(stage: int, *acts: Callable[[Learner], Iterator[Row]]) -> tuple[Callable[[Settings], Iterator[Row]], ...]:
    """Checks in one stage; they share an engine, which the first of them makes."""
    made: list[Learner] = []

    def of(settings: Settings) -> Learner:
        if not made:
            made.append(Learner(settings, stage))
        return made[0]

    def check(act: Callable[[Learner], Iterator[Row]]) -> Callable[[Settings], Iterator[Row]]:
        def run(settings: Settings) -> Iterator[Row]:
            if settings.dry or cards():
                yield from act(of(settings))
            else:
                yield skipped(act.__name__, CARD_NEEDED)

        run.__name__ = act.__name__
        return run

    return tuple(map(check, acts))


# Resuming makes a second engine, which would count in the other checks' memory: it has a process of its own.
ZERO_2, RESUME_2 = _in_stage(2, gradient, speed, largest), _in_stage(2, resume)
ZERO_3, RESUME_3 = _in_stage(3, gradient, speed, largest), _in_stage(3, resume)
