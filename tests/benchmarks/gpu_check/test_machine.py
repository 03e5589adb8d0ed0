"""What the machine offers, with right and wrong values."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import machine, packages
from benchmarks.gpu_check.rows import Row
from benchmarks.gpu_check.settings import Settings
from tests import needs


def verdicts(rows: Any) -> dict[str, str]:
    return {row.name: row.verdict for row in rows}


@pytest.mark.parametrize(
    ("counts", "visible", "dry", "agree"),
    [
        ({"NVML": 2, "torch": 2, "Ray": 2}, None, False, "ok"),
        ({"NVML": 2, "torch": 1, "Ray": 2}, None, False, "failed"),
        ({"NVML": 2, "torch": 2, "Ray": 1}, None, False, "failed"),
        ({"NVML": 8, "torch": 2, "Ray": 2}, "0,1", False, "ok"),
        ({"NVML": 8, "torch": 2, "Ray": 8}, "0,1", False, "failed"),
        ({"NVML": 0, "torch": 0, "Ray": 0}, None, True, "ok"),
    ],
)
def test_cards_are_counted_alike(counts: dict[str, int], visible: str | None, dry: bool, agree: str) -> None:
    assert verdicts(machine.judge_counts(counts, visible, dry=dry))["cards, counts agree"] == agree


def test_a_machine_without_a_card_fails_unless_it_is_dry() -> None:
    none = {"NVML": 0, "torch": 0, "Ray": 0}
    assert verdicts(machine.judge_counts(none, None, dry=False))["cards, at least one"] == "failed"
    assert "cards, at least one" not in verdicts(machine.judge_counts(none, None, dry=True))


def node(address: str, kind: str, cards: list[str], offered: int, *, alive: bool = True) -> dict[str, Any]:
    resources = {kind: 1.0, "GPU": float(offered)} | {f"card/GPU-{card}": 1.0 for card in cards}
    return {"Alive": alive, "NodeManagerAddress": address, "Resources": resources}


def test_containers_with_a_card_each_are_right() -> None:
    nodes = [node("10.0.0.4", "rollout", ["a"], 1), node("10.0.0.5", "learner", ["b"], 1)]
    assert set(verdicts(machine.judge_containers(nodes)).values()) == {"ok"}


def test_two_containers_with_one_card_and_one_that_hides_a_card_are_noticed() -> None:
    nodes = [node("10.0.0.4", "rollout", ["a"], 1), node("10.0.0.5", "rollout", ["a"], 2)]
    assert verdicts(machine.judge_containers(nodes)) == {
        "cards, container 0 (1 rollout)": "ok",
        "cards, container 1 (1 rollout)": "failed",
        "cards, none in two containers": "failed",
    }


def test_a_copy_that_arrives_changed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.copied_exactly("copy", "cpu", "cpu").verdict == "ok"
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: torch.zeros_like(self))
    assert machine.copied_exactly("copy", "cpu", "cpu").verdict == "failed"


def test_the_compiler_must_make_a_library_that_works(tmp_path: Path) -> None:
    program = shutil.which("cc")
    if program is None:
        pytest.skip(needs.debian("gcc", "libc6-dev", "python3-dev"))
    settings = Settings(dry=True, model="tiny-64", folder=tmp_path)
    wrong = "int answer(void) { return 41; }"
    broken = "#include <no_such_header.h>\nint answer(void) { return 42; }"
    found = [machine.compiled(program, settings, text).verdict for text in (wrong, broken)]
    assert found == ["failed", "failed"]
    assert "no_such_header.h" in machine.compiled(program, settings, broken).reason


def test_small_shared_memory_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(dry=True, model="tiny-64", folder=tmp_path)
    assert {row.name for row in machine.host(settings)} >= {"memory, GiB", "cores"}
    monkeypatch.setattr(machine, "SHM_GIB", 1e6)  # as if Docker's 64 MiB were asked for too much
    assert verdicts(machine.host(settings))["/dev/shm, size, GiB"] == "failed"


def test_what_cannot_be_imported_is_a_failed_row() -> None:
    assert packages.imported("json").verdict == "ok"
    missing = packages.imported("no_such_package_at_all")
    assert missing == Row(
        "import no_such_package_at_all",
        None,
        "failed",
        "ModuleNotFoundError: No module named 'no_such_package_at_all'",
    )
