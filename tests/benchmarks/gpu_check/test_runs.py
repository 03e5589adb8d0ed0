"""The judgement of transfers, of two cards, of runs and of the two algorithms, with right and wrong values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import algorithms, end_to_end, two_cards, weights
from benchmarks.gpu_check.models import SIZES, folder_of
from benchmarks.gpu_check.rows import Row
from benchmarks.gpu_check.settings import Settings
from services.errors import AnchorageError


def verdicts(rows: Iterable[Row]) -> list[str]:
    return [row.verdict for row in rows]


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (0.5, 1e-4, ["ok", "ok"]),
        (0.5, 0.09, ["ok", "ok"]),  # rounding
        (0.5, 0.5, ["ok", "failed"]),  # nothing arrived
        (0.5, 0.3, ["ok", "failed"]),  # a layer is missing
        (1e-4, 1e-4, ["failed", "ok"]),  # nothing had changed: the transfer shows nothing
        (0.5, math.nan, ["ok", "failed"]),
    ],
)
def test_weights_that_do_not_arrive_are_noticed(before: float, after: float, found: list[str]) -> None:
    assert verdicts(weights.judge_arrival("ray", before, after)) == found


def test_every_channel_of_the_configuration_is_measured() -> None:
    assert {"ray", "directory", "nccl"} <= set(weights.CHANNELS)
    possible = [{name for name in weights.CHANNELS if not weights.lacking(name, count)} for count in (0, 1, 2)]
    assert all({"ray", "directory"} <= names for names in possible)
    assert [names & {"nccl", "ipc", "gloo"} for names in possible] == [{"gloo"}, {"ipc"}, {"nccl"}]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([{"wrong": 0, "gb_s": 9.0}, {"wrong": 0, "gb_s": 8.0}], ["ok", "ok", "measured"]),
        ([{"wrong": 0, "gb_s": 9.0}, {"wrong": 5, "gb_s": 8.0}], ["ok", "failed", "measured"]),
        (["NCCL error: unhandled system error", "NCCL error: …"], ["failed", "failed"]),
    ],
)
def test_a_sum_that_is_wrong_or_did_not_end_is_noticed(found: Any, expected: list[str]) -> None:
    rows = list(two_cards.judge_sums("NCCL", found))
    assert verdicts(rows) == expected
    assert rows[0].reason in ("0", "NCCL error: unhandled system error")


def test_two_processes_add_up_and_ones_that_fail_are_told() -> None:
    sums = two_cards._sums("cpu", 1)
    assert verdicts(two_cards.judge_sums("Gloo", sums)) == ["ok", "ok", "measured"]
    broken = two_cards._sums("no-such-device", 0)
    assert verdicts(two_cards.judge_sums("Gloo", broken)) == ["failed", "failed"]


def test_two_ranks_that_train_otherwise_than_one_are_noticed() -> None:
    one = {"loss": -0.1, "grad_norm": 2.0}
    assert verdicts(two_cards.judge_ranks(one, {"loss": -0.101, "grad_norm": 2.01})) == ["ok", "ok"]
    assert verdicts(two_cards.judge_ranks(one, {"loss": -0.1, "grad_norm": 4.0})) == ["ok", "failed"]
    assert verdicts(two_cards.judge_ranks(one, {"loss": 0.1, "grad_norm": math.nan})) == ["failed", "failed"]


def records(count: int = end_to_end.UPDATES, **changes: float) -> list[dict[str, float]]:
    record = {"loss": 0.1, "loss/fresh_gap": 0.01, "time/update_s": 2.0, "rollout/success_rate": 0.0}
    return [record | {"step": step} | (changes if step == count else {}) for step in range(1, count + 1)]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (records(), ["ok", "ok", "ok", "measured"]),
        (records(2), ["failed", "ok", "ok", "measured"]),
        (records(loss=math.nan), ["ok", "failed", "ok", "measured"]),
        (records(**{"loss/fresh_gap": 0.06}), ["ok", "ok", "failed", "measured"]),
        ([{"step": step} for step in range(1, 4)], ["ok", "ok", "failed"]),
    ],
    ids=["right", "two updates", "a loss that is not finite", "a gap", "nothing compared"],
)
def test_a_run_is_judged_by_its_records(found: Any, expected: list[str]) -> None:
    assert verdicts(end_to_end.judge("apart", found, "bfloat16")) == expected


def time_verdict(gigpo: float, grpo: float, *, whole: bool = True) -> str:
    rows = algorithms.judge_time(
        {"gigpo": gigpo, "grpo": grpo}, {"gigpo": [10.0, 9.0, 11.0], "grpo": [9.9]}, whole=whole
    )
    (row,) = (row for row in rows if "share of an update" in row.name)
    return row.verdict


def test_time_and_memory_that_gigpo_adds_are_judged() -> None:
    assert time_verdict(0.110, 0.100) == "ok"  # 0.1 %
    assert time_verdict(0.200, 0.100) == "failed"  # 1 %
    assert time_verdict(0.200, 0.100, whole=False) == "skipped"
    assert verdicts(algorithms.judge_peaks({"gigpo": 1003, "grpo": 1000}))[-1] == "ok"
    assert verdicts(algorithms.judge_peaks({"gigpo": 1100, "grpo": 1000}))[-1] == "failed"


def test_a_model_is_a_size_or_a_folder(tmp_path: Path) -> None:
    settings = Settings(dry=True, model="tiny-128", folder=tmp_path)
    folder = folder_of(settings)
    assert folder_of(settings) == folder_of(settings, str(folder)) == folder
    assert (folder / "tokenizer.json").is_file()
    with pytest.raises(AnchorageError, match=r"--model tiny-12: .* did you mean tiny-128"):
        folder_of(settings, "tiny-12")
    for sizes in SIZES.values():
        assert sizes["hidden_size"] / sizes["num_attention_heads"] in (64, 128)
