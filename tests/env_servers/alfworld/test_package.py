"""The `alfworld` package is fetched once where it is missing, checked against its hash, or asked for in one line."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from env_servers.alfworld import package
from env_servers.alfworld.domain import domain
from env_servers.alfworld.problem import TASK_TYPES
from env_servers.environment import TaskError


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels in place of pip's index, with one of an `alfworld` of our own; the cache is empty."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "alfworld-0.4.2-py3-none-any.whl"
    info = "alfworld-0.4.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("alfworld/__init__.py", "")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: alfworld\nVersion: 0.4.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(
            f"{info}/RECORD", f"alfworld/__init__.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
        )
    monkeypatch.setattr(package, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return wheels


def test_the_package_is_fetched_once(index: Path) -> None:
    folder = package._fetched()
    assert (folder / "alfworld" / "__init__.py").is_file()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    for wheel in index.iterdir():
        wheel.unlink()
    assert package._fetched() == folder


def test_another_wheel_of_the_name_is_refused(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(TaskError, match=r"HASHES.*pip install --no-deps alfworld==0\.4\.2"):
        package._fetched()
    assert not [*(index.parent / "cache" / "anchorage").iterdir()]


def test_without_an_index_one_line_says_what_to_install(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "nothing"))
    with pytest.raises(TaskError, match=r"is missing \(.*\): pip install --no-deps alfworld==0\.4\.2") as refused:
        package._fetched()
    assert "\n" not in str(refused.value)


def test_a_cache_that_cannot_be_written_is_one_line(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (index.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(index.parent / "file"))
    with pytest.raises(TaskError, match=r"Not a directory.*pip install --no-deps alfworld==0\.4\.2"):
        package._fetched()


def test_the_rules_are_whole() -> None:
    rules = domain()
    assert set(rules.goals) == set(TASK_TYPES)
    assert "(define (domain alfred)" in rules.pddl
    assert "UNKNOWN GOAL" in rules.grammar
    assert rules.able["Sliceable"] <= {"Apple", "Bread", "Egg", "Lettuce", "Potato", "Tomato"}
    assert "Mug" in rules.fits["CoffeeMachine"]
    assert "Mug" in rules.movable_receptacles
