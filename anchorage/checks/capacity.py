"""Whether a run can fit this machine: its GPUs where vLLM computes on GPUs, else its memory.

The check refuses only what cannot fit: its figures leave out what is assumed and not computed (fragmentation, CUDA's
own memory). `anchorage plan` shows all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from anchorage.checks.model_shape import engine_is_on_cpu
from anchorage.planning.assumptions import Assumptions
from anchorage.planning.fixes import as_overrides, fixes
from anchorage.planning.plan import GIB, Cards, Plan, gib, make_plan
from anchorage.planning.shapes import COUNTED, shape_of
from services.config.tree import Config
from services.errors import ModelUnavailable

CERTAIN = replace(Assumptions(), usable=1.0, context_gib=0.0, graphs_gib=0.0, fragmentation=0.0, shared=0.0)
"""Nothing is taken for granted that might turn out smaller."""


def cards_here() -> Cards:
    """The GPUs that this process sees, by the smallest of them; none where the installed packages compute on CPUs."""
    if engine_is_on_cpu():
        return Cards(0, 0.0)
    try:
        import torch
    except ModuleNotFoundError:  # the base installation
        return Cards(0, 0.0)
    count = torch.cuda.device_count()
    if count == 0:
        return Cards(0, 0.0)
    smallest = min(torch.cuda.get_device_properties(number).total_memory for number in range(count))
    return Cards(count, smallest / GIB)


def memory_here() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def capacity_problems(config: Config, cards: Cards, memory: int) -> Iterator[str]:
    """Yield a line, with the overrides to use, if a training run cannot fit.

    Args:
        config: of the run.
        cards: GPUs of the machine; none: the run computes on CPUs.
        memory: of the machine in bytes.
    """
    try:
        shape = shape_of(config.model.path)
    except ModelUnavailable:
        return  # reported with the model's folder, or left to the code that loads it
    problem = _problem(make_plan(config, shape, cards, CERTAIN, memory))
    if problem is None:
        return
    # Whether the host has enough is not judged on a machine with GPUs: most of it is assumed.
    changes = fixes(make_plan(config, shape, cards, memory=None if cards.count else memory))
    advice = "use more or larger GPUs, or a smaller model" if cards.count else "use a smaller model or a larger machine"
    if changes:
        advice = f"set {' '.join(as_overrides(changes))}"
    yield f"the run does not fit: {problem}; {advice} (anchorage plan shows the figures)"


def _problem(plan: Plan) -> str | None:
    """What cannot fit, as part of a sentence; None: it can."""
    config = plan.config
    if not plan.cards.count:
        needed = plan.host.learner + plan.host.engines
        if plan.memory is None or needed <= plan.memory:
            return None
        return f"learner and engines need {gib(needed)} GiB of memory, and the machine has {gib(plan.memory)}"
    if plan.cards_needed > plan.cards.count:
        return f"ranks and actors need {plan.cards_needed} GPUs, and the machine has {plan.cards.count}"
    # Activations of other architectures are a guess.
    rank = plan.rank_total - (0 if plan.shape.kind in COUNTED else plan.rank["activations"])
    if rank > plan.card:
        return f"a learner rank needs {gib(rank)} GiB, and a GPU has {gib(plan.card)}"
    if config.rollout.share_gpus is True and rank + config.rollout.actors * plan.engine.share > plan.card:
        share = config.rollout.gpu_memory_utilization
        return (
            f"a learner rank needs {gib(rank)} GiB of a GPU with {gib(plan.card)}, of which "
            f"rollout.gpu_memory_utilization={share:g} takes {gib(config.rollout.actors * plan.engine.share)}"
        )
    if plan.engine.weights > plan.engine.share:
        return f"the engine's weights need {gib(plan.engine.weights)} GiB of its share of {gib(plan.engine.share)}"
    return None
