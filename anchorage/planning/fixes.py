"""Finds overrides that make a plan fit: those that cost least speed first, and quality last.

Every combination of the levers is planned; the cheapest that is valid and fits is taken. Timeouts are set to
what the longest episode needs.

Example: Qwen2.5-7B on four ranks, 8,192 tokens a pass, 80 GiB: activation checkpointing alone costs 3 and fits, so it
comes before smaller passes (1 each, but two halvings do not fit).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from anchorage.planning.plan import MARGIN, Plan, make_plan
from services.config.tree import COLLECTIVE, Config, LoraConfig

Changes = Mapping[str, Any]
"""Values by dotted key."""
Lever = list[tuple[float, Changes]]
"""Alternatives of one lever with their costs; the first is to change nothing."""

LEAST_TOKENS = 2048
"""Smallest pass that is suggested: shorter ones leave a GPU idle."""
ENOUGH = 16
"""Episodes of the greatest length that a suggested KV cache should hold."""
SHARES = tuple(round(0.05 * n, 2) for n in range(17, 2, -1))
"""Values of `rollout.gpu_memory_utilization` that are tried on shared cards, the largest first."""


def fixes(plan: Plan) -> dict[str, Any] | None:
    """Overrides that make the plan fit, by dotted key; empty: none are needed. None: no combination fits."""
    found: dict[str, Any] | None = {}
    if not plan.fits:
        found = _cheapest(plan)
    if found is None:
        return None
    changed = planned(plan, found)
    return found | _timeouts(changed)


def planned(plan: Plan, changes: Changes) -> Plan:
    """The same plan with changes."""
    return make_plan(with_changes(plan.config, changes), plan.shape, plan.cards, plan.assumed, plan.memory)


def with_changes(config: Config, changes: Changes) -> Config:
    """A configuration with values set by dotted key; each must be valid, but not together (`Config.conflicts`)."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, name = key.split(".", 1)
        if name == "lora.rank":
            name, value = "lora", LoraConfig(rank=value)
        sections.setdefault(section, {})[name] = value
    new = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=new)


def _cheapest(plan: Plan) -> dict[str, Any] | None:
    """The cheapest combination that fits, by dotted key; if possible one whose KV cache holds `ENOUGH` episodes."""
    fallback: dict[str, Any] | None = None
    for placement in _placements(plan):
        combined = [
            (sum(cost for cost, _ in choice), {key: value for _, each in choice for key, value in each.items()})
            for choice in itertools.product(*_levers(planned(plan, placement)))
        ]
        for _, changes in sorted(combined, key=lambda each: each[0]):
            whole = {**placement, **changes}
            tried = planned(plan, whole)
            if any(tried.config.conflicts()):
                continue
            if not tried.fits:
                share = _share_that_fits(tried)
                if share is None:
                    continue
                whole["rollout.gpu_memory_utilization"] = share
                tried = planned(plan, whole)
            if plan.cards.count == 0 or tried.engine.episodes >= min(ENOUGH, tried.config.rollout.episodes_in_flight):
                return whole
            fallback = fallback or whole
    return fallback


def _placements(plan: Plan) -> Iterator[dict[str, Any]]:
    """Ways to distribute ranks and actors over the cards: the configured one if there is room, then others.

    Example: 8 cards, 4 ranks and 2 actors of one card each, for a model whose weights do not fit one card.

        as configured       4 ranks, 2 actors of 1 card
        all cards           6 ranks, 2 actors of 1 card
        one card            shared at the same time; then in turns
        wider engines       6 ranks, 1 actor of 2 cards; then 4 ranks, 1 actor of 4 cards
    """
    config, cards = plan.config, plan.cards.count
    ranks, actors, parts = config.learner.ranks, config.rollout.actors, config.rollout.tensor_parallel
    if plan.cards_needed <= cards or cards == 0:
        yield {}
    if cards == 1:
        yield from _on_one_card(config)
    elif plan.cards_needed > cards > 1:
        # Half of the cards at most, a power of two.
        ranks = min(ranks, 2 ** int(math.log2(cards // 2)))
        actors = 1 if plan.turns else max(1, (cards - ranks) // parts)
        if ranks + actors * parts <= cards:
            yield _differing(config, {"learner.ranks": ranks, "rollout.actors": actors})
    if cards < 2 or config.rollout.share_gpus:
        return
    for wider in (parts, 2 * parts, 4 * parts):
        engines = max(1, actors * parts // wider)
        left = cards - engines * wider
        if left >= 1 and plan.shape.heads % wider == 0:
            placed = {"learner.ranks": left, "rollout.actors": engines, "rollout.tensor_parallel": wider}
            yield _differing(config, placed)


def _on_one_card(config: Config) -> Iterator[dict[str, Any]]:
    """Ranks and actors on one card at the same time, then in turns; with what these need of other keys."""
    one = {"rollout.share_gpus": True, "rollout.actors": 1, "rollout.tensor_parallel": 1, "learner.ranks": 1}
    yield _differing(config, one | ({"weights.channel": "ray"} if config.weights.channel == "nccl" else {}))
    turns: dict[str, Any] = {**one, "rollout.share_gpus": "turns", "learner.max_staleness": 0}
    if config.learner.zero_stage < 2:
        turns["learner.zero_stage"] = 2
    if config.learner.offload_parameters:
        turns["learner.offload_parameters"] = False
    if config.learner.reference == "sharded":
        turns["learner.reference"] = "offloaded"
    if config.weights.channel in COLLECTIVE:
        turns["weights.channel"] = "ray"
    yield _differing(config, turns)


def _levers(plan: Plan) -> list[Lever]:
    """What can be changed about a rank, with costs."""
    learner, model = plan.config.learner, plan.config.model
    context = model.max_prompt_tokens + model.max_response_tokens
    none: tuple[float, Changes] = (0.0, {})
    halves = [learner.microbatch_tokens // 2**n for n in (1, 2, 3)]
    # Sharded parameters are gathered again in each pass.
    dear = 2.0 if learner.zero_stage == 3 else 1.0
    passes: Lever = [
        (dear * (1.0 + 1.5 * n), {"learner.microbatch_tokens": tokens})
        for n, tokens in enumerate(halves)
        if tokens >= max(context, LEAST_TOKENS)
    ]
    levers: list[Lever] = [[none, *passes]]
    if not learner.activation_checkpointing:
        levers.append([none, (3.0, {"learner.activation_checkpointing": True})])
    if plan.config.loss.kl_coef > 0 and model.lora is None and learner.reference == "resident":
        kind = "sharded" if learner.ranks > 1 else "offloaded"
        levers.append([none, (1.2, {"learner.reference": kind})])
    stages: Lever = [(0.5, {"learner.zero_stage": 2})] if learner.zero_stage < 2 else []
    stages += [(2.0, {"learner.zero_stage": 3})] if learner.zero_stage < 3 and learner.ranks > 1 else []
    levers.append([none, *stages])
    if not learner.offload_optimizer and model.lora is None:
        levers.append([none, (8.0, {"learner.offload_optimizer": True})])
    if model.lora is None and plan.cards.count:
        levers.append([none, (20.0, {"model.lora.rank": 16})])
    return levers


def _share_that_fits(plan: Plan) -> float | None:
    """Largest share of a card for the engines with which the plan fits; None if there is none."""
    if not plan.cards.count:
        return None
    for share in SHARES:
        tried = planned(plan, {"rollout.gpu_memory_utilization": share})
        room = tried.card - tried.rank_total
        if plan.config.rollout.share_gpus is True and tried.config.rollout.actors * tried.engine.share > room:
            continue
        return share if tried.fits else None
    return None


def _timeouts(plan: Plan) -> dict[str, Any]:
    """Timeouts that the longest episode needs, rounded up to minutes."""
    if plan.timing is None:
        return {}
    needed = 60.0 * math.ceil(MARGIN * plan.timing.longest / 60)
    values = {
        "rollout.episode_timeout_s": plan.config.rollout.episode_timeout_s,
        "learner.group_timeout_s": plan.config.learner.group_timeout_s,
    }
    short = {key for key, value in values.items() if value < MARGIN * plan.timing.longest}
    # A group is complete only after its last episode, which may have started late.
    times = {"rollout.episode_timeout_s": 1.0, "learner.group_timeout_s": 1.5}
    return {key: needed * times[key] for key in values if key in short}


def _differing(config: Config, changes: Changes) -> dict[str, Any]:
    """The changes that change something."""
    return {
        key: value
        for key, value in changes.items()
        if getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) != value
    }


def as_overrides(changes: Changes) -> list[str]:
    """The changes as they are typed on a command line."""
    from services.config import recipe_yaml

    return [f"{key}={recipe_yaml.dump_line('k', value)[3:]}" for key, value in changes.items()]
