"""A plan adds up what lies on each card, says what does not fit, and finds overrides that make it fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anchorage.planning.assumptions import AssumptionInvalid, Assumptions
from anchorage.planning.fixes import as_overrides, fixes, planned
from anchorage.planning.plan import GIB, Cards, CardsInvalid, Plan, cards_of, make_plan
from anchorage.planning.shapes import Shape, shape_of
from services.config import load_config

OLDER = {
    "alfworld": ["learner.microbatch_tokens=16384", "learner.activation_checkpointing=false"],
    "alfworld-7b": ["learner.ranks=4", "learner.microbatch_tokens=8192", "learner.activation_checkpointing=false"],
    "alfworld-qwen3": ["learner.ranks=2", "learner.microbatch_tokens=8192", "learner.activation_checkpointing=false"],
}
"""Settings with which these recipes need more than 80 GB, or nearly as much."""


def plan_of(recipe: str, gpus: str, *overrides: str, memory: int | None = None, **assumed: float) -> Plan:
    config = load_config(Path(f"configs/{recipe}.yaml"), overrides)
    given = [f"{name}={value}" for name, value in assumed.items()]
    return make_plan(config, shape_of(config.model.path), cards_of(gpus), Assumptions().changed(given), memory)


@pytest.mark.parametrize(
    ("recipe", "gibibytes"), [("alfworld", 77.4), ("alfworld-7b", 100.8), ("alfworld-qwen3", 95.2)]
)
def test_without_recomputation_a_rank_needs_what_was_computed_from_measurements(recipe: str, gibibytes: float) -> None:
    plan = plan_of(recipe, "8x80", *OLDER[recipe], "learner.reference=resident", "rollout.share_gpus=false")
    assert (plan.rank_total - plan.rank["overhead"]) / GIB == pytest.approx(gibibytes, rel=0.03)


def test_the_total_of_a_rank_is_the_sum_of_its_rows() -> None:
    plan = plan_of("alfworld", "2x80")
    assert plan.rank_total == sum(plan.rank.values())
    assert plan.record()["rank"]["total"] == plan.rank_total  # type: ignore[index]
    engine = plan.engine
    assert engine.weights + engine.workspace + engine.overhead + engine.cache == engine.share


def test_recomputing_layers_and_smaller_passes_take_less() -> None:
    whole = plan_of("alfworld", "2x80", *OLDER["alfworld"]).rank["activations"]
    assert plan_of("alfworld", "2x80", "learner.activation_checkpointing=true").rank["activations"] < whole / 5
    half = plan_of("alfworld", "2x80", *OLDER["alfworld"], "learner.microbatch_tokens=8192").rank["activations"]
    assert half == pytest.approx(whole / 2, rel=0.02)


def test_more_cards_than_there_are_is_a_problem() -> None:
    plan = plan_of("alfworld", "1x80")
    assert plan.cards_needed == 2
    assert "need 2 GPUs, there are 1" in plan.problems[0]


def test_on_a_shared_card_rank_and_engines_are_added() -> None:
    shared = ("rollout.share_gpus=true", "learner.activation_checkpointing=true", "learner.microbatch_tokens=8192")
    fitting = plan_of("alfworld", "1x80", *shared, "rollout.gpu_memory_utilization=0.3")
    assert fitting.fits
    assert fitting.on_first_card == fitting.rank_total + fitting.engine.share
    twice = plan_of("alfworld", "1x80", *shared, "rollout.gpu_memory_utilization=0.3", "rollout.actors=2")
    assert twice.on_first_card == twice.rank_total + 2 * twice.engine.share
    assert not plan_of("alfworld", "1x80", *shared, "rollout.gpu_memory_utilization=0.85").fits


TURNS = ("rollout.share_gpus=turns", "learner.max_staleness=0", "learner.activation_checkpointing=true")


def test_on_a_card_with_turns_the_larger_counts_and_states_need_host_memory() -> None:
    turns, apart = plan_of("alfworld", "1x48", *TURNS), plan_of("alfworld", "2x48", *TURNS[1:])
    assert turns.fits
    assert turns.cards_needed == 1
    assert (turns.rank, turns.engine) == (apart.rank, apart.engine)
    assert turns.on_first_card == max(turns.rank_total, turns.engine.share) + GIB
    states = sum(turns.rank[name] for name in ("parameters", "gradients", "optimizer", "reference"))
    assert turns.host.learner == states
    assert turns.timing is not None
    assert apart.timing is not None
    assert turns.timing.update == pytest.approx(apart.timing.update + 2 * states / 10e9)
    assert not turns.warnings


@pytest.mark.parametrize(("share", "whose"), [("0.99", "an engine"), ("0.3", "a learner rank")])
def test_who_does_not_fit_a_card_with_turns_is_named(share: str, whose: str) -> None:
    plan = plan_of("alfworld", "1x35.2", *TURNS, f"rollout.gpu_memory_utilization={share}", usable=1.0)
    (problem,) = plan.problems
    assert problem.startswith(f"{whose} (")
    assert "while it waits (1.0) do not fit a card of 35.2 GiB" in problem


def test_stage_1_in_bfloat16_is_warned_of() -> None:
    (line,) = plan_of("alfworld", "2x80", "learner.zero_stage=1").warnings
    assert line.startswith("learner.zero_stage=1 takes 2.9 GiB more than 2 in bfloat16")
    assert not plan_of("alfworld", "2x80", "learner.zero_stage=1", "model.dtype=float32").warnings


def test_with_turns_stale_groups_save_nothing() -> None:
    (line,) = plan_of("alfworld", "1x48", *TURNS, "learner.max_staleness=1").warnings
    assert "nothing is sampled during an update" in line


def test_a_model_that_no_card_holds_twice_gets_turns() -> None:
    plan = plan_of("alfworld-7b", "1x24")
    changes: Any = fixes(plan)
    assert changes["rollout.share_gpus"] == "turns"
    assert planned(plan, changes).fits
    again = plan_of("alfworld-7b", "1x24", *as_overrides(changes))
    assert again.record() == planned(plan, changes).record()


def test_a_share_without_room_for_one_episode_is_a_problem() -> None:
    small = plan_of("alfworld-7b", "8x24", "rollout.gpu_memory_utilization=0.5")
    assert any("for one episode of 2,560 tokens" in line for line in small.problems)


def test_tensor_parallel_engines_divide_weights_and_cache() -> None:
    one, two = (plan_of("alfworld-7b", "8x80", f"rollout.tensor_parallel={n}", "rollout.actors=1") for n in (1, 2))
    assert two.engine.weights == -(-one.engine.weights // 2)
    assert two.engine.token == one.engine.token / 2
    assert two.cards_needed == one.cards_needed + 1


def test_a_host_with_too_little_memory_is_a_problem() -> None:
    assert plan_of("demo", "0", memory=24 * GIB).fits
    (problem,) = plan_of("demo", "0", memory=GIB).problems
    assert problem.startswith("the host needs ")


def test_actors_that_add_adapters_keep_the_base_weights() -> None:
    whole, adapted = plan_of("alfworld", "2x80").host, plan_of("alfworld", "2x80", "model.lora.rank=16").host
    weights = 2 * 1_543_714_304
    assert whole.weights == 2 * weights
    assert weights < adapted.weights < 1.1 * weights
    assert adapted.disk < whole.disk / 3


def test_timeouts_that_the_longest_episode_exceeds_are_warnings() -> None:
    given = ("rollout.episode_timeout_s=600", "learner.group_timeout_s=900")
    lines = plan_of("alfworld-qwen3", "3x80", *given).warnings
    assert [line.partition("=")[0] for line in lines[:2]] == ["rollout.episode_timeout_s", "learner.group_timeout_s"]
    assert "50 steps of 1,024 tokens" in lines[0]
    assert not plan_of("alfworld-qwen3", "3x80", *given, memory_gb_s=1e6, step_ms=0.1, tflops=1e6).warnings


@pytest.mark.parametrize(
    ("recipe", "gpus", "overrides"),
    [
        ("alfworld", "2x80", OLDER["alfworld"]),
        ("alfworld-7b", "8x80", OLDER["alfworld-7b"]),
        ("alfworld-qwen3", "3x80", OLDER["alfworld-qwen3"]),
        ("alfworld", "1x80", []),
        ("alfworld", "1x24", []),
        ("alfworld-7b", "2x24", []),
    ],
)
def test_fixes_make_it_fit(recipe: str, gpus: str, overrides: list[str]) -> None:
    plan = plan_of(recipe, gpus, *overrides)
    assert not plan.fits
    changes = fixes(plan)
    assert changes is not None
    assert planned(plan, changes).fits
    # As typed they mean the same.
    again = plan_of(recipe, gpus, *overrides, *as_overrides(changes))
    assert again.record() == planned(plan, changes).record()


@pytest.mark.parametrize(
    ("recipe", "gpus", "overrides"),
    [
        ("alfworld-7b", "1x140", ["weights.channel=nccl"]),
        ("alfworld-7b", "1x24", ["weights.channel=gloo"]),
        ("alfworld-7b", "1x24", ["learner.reference=sharded", "loss.kl_coef=0.01"]),
        ("alfworld-7b", "1x24", ["learner.zero_stage=3", "learner.offload_parameters=true"]),
        ("alfworld", "8x24", ["rollout.share_gpus=turns", "learner.zero_stage=2", "learner.ranks=16"]),
        ("alfworld", "1x48", ["model.dtype=float32", "learner.zero_stage=0"]),
    ],
)
def test_fixes_are_valid_together(recipe: str, gpus: str, overrides: list[str]) -> None:
    plan = plan_of(recipe, gpus, *overrides)
    assert not plan.fits
    changes = fixes(plan)
    assert changes
    assert plan_of(recipe, gpus, *overrides, *as_overrides(changes)).fits


def test_a_card_that_is_shared_already_may_get_turns() -> None:
    plan = plan_of("alfworld-7b", "1x24", "rollout.share_gpus=true", "rollout.actors=1", "learner.ranks=1")
    changes: Any = fixes(plan)
    assert changes["rollout.share_gpus"] == "turns"


def test_fixes_set_timeouts_too() -> None:
    plan = plan_of("alfworld-qwen3", "3x80", "rollout.episode_timeout_s=600", "learner.group_timeout_s=900")
    changes: Any = fixes(plan)
    assert changes["learner.group_timeout_s"] > changes["rollout.episode_timeout_s"] > 600
    assert not [line for line in planned(plan, changes).warnings if "timeout" in line]


LARGE = Shape("qwen2", 80, 8192, 29568, 64, 8, 128, 152_064, tied=False, qkv_bias=True)
"""Qwen2.5-72B: its weights fit no card of 80 GiB."""


def test_a_model_larger_than_a_card_gets_wider_engines_and_more_ranks() -> None:
    config = load_config(Path("configs/alfworld-7b.yaml"), ["learner.ranks=4", "rollout.actors=2"])
    plan = make_plan(config, LARGE, cards_of("16x80"))
    changes = fixes(plan)
    assert changes is not None
    assert changes["rollout.tensor_parallel"] >= 4
    after = planned(plan, changes)
    assert after.fits
    assert after.cards_needed <= 16
    assert after.config.learner.ranks > 4


def test_what_no_override_can_fit_has_no_fixes() -> None:
    assert fixes(plan_of("alfworld-7b", "1x8")) is None


@pytest.mark.parametrize("text", ["4", "x80", "0x80", "4x0", "four", "4x80x2", "-1x80", ""])
def test_cards_are_a_number_and_a_memory(text: str) -> None:
    with pytest.raises(CardsInvalid, match="4x80"):
        cards_of(text)
    assert (cards_of("4x80"), cards_of("0")) == (Cards(4, 80.0), Cards(0, 0.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("usabel=1", "did you mean usable?"),
        ("steps=x", "a number"),
        ("steps=-1", "> 0"),
        ("usable=1.5", "<= 1"),
        ("shared=1", "< 1"),
    ],
)
def test_assumptions_are_named_and_positive(given: str, message: str) -> None:
    with pytest.raises(AssumptionInvalid, match=message.replace("?", r"\?")):
        Assumptions().changed([given])


def test_each_assumption_is_documented() -> None:
    text = str(Assumptions.__doc__)
    assert all(f"        {name}: " in text for name in Assumptions().record())


def test_arguments_of_the_engine_count() -> None:
    plain = plan_of("alfworld-7b", "8x80").engine
    small = plan_of(
        "alfworld-7b",
        "8x80",
        "rollout.engine.kv_cache_dtype=fp8",
        "rollout.engine.quantization=fp8",
        "rollout.engine.max_num_batched_tokens=16384",
    ).engine
    assert small.token == plain.token / 2
    assert small.weights == plain.weights / 2
    assert small.workspace > plain.workspace
    assert small.episodes > 2 * plain.episodes
