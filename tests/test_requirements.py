"""The locks: complete, hashed, equal to each other, within pyproject's ranges; nothing names a stranger's package."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.requirements import PYTHONS, ROOT, lock, normal, pins, without

LOCKS = sorted(path.stem for path in (ROOT / "requirements").glob("*.txt") if path.stem != "torch")
WITHOUT = {*without("without"), *without("without-textworld"), *without("without-torch")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_lock_is_read() -> None:
    assert {"base", "env", "cpu", "gpu", "dev", "textworld", "bench-trl", "openenv-0.3", "openenv-0.10"} == set(LOCKS)


@pytest.mark.parametrize("name", LOCKS)
def test_everything_is_pinned_with_hashes(name: str) -> None:
    for package, entries in lock(name).items():
        for pin in entries:
            assert pin.hashes, package
            assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in pin.hashes), package


@pytest.mark.parametrize("name", [*LOCKS, "torch"])
def test_no_lock_names_an_index_or_a_path(name: str) -> None:
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        if not line.lstrip().startswith("#"):
            assert not re.search(r"index|find-links|://|file:|(^|\s)/", line), line


@pytest.mark.parametrize("name", ["base", "env", "dev", "textworld", "bench-trl"])
@pytest.mark.parametrize("python", PYTHONS)
def test_locks_that_are_installed_together_agree(name: str, python: str) -> None:
    cpu = pins("cpu", python)
    small = pins(name, python)
    assert {package: version for package, version in small.items() if cpu.get(package, version) != version} == {}


def test_torch_is_in_no_lock_but_its_own() -> None:
    assert [name for name in LOCKS if "torch" in lock(name)] == []
    lines = (ROOT / "requirements" / "torch.txt").read_text().splitlines()
    [torch] = [Requirement(line) for line in lines if not line.startswith("#")]
    assert str(torch.specifier).startswith("==")


def _wanted(extra: str, python: str) -> Iterator[Requirement]:
    """What an extra of ours asks for, other extras of ours followed; `""`: the base."""
    listed = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for requirement in map(Requirement, listed):
        if requirement.name == PROJECT["name"]:
            for inner in requirement.extras:
                yield from _wanted(inner, python)
        elif requirement.marker is None or requirement.marker.evaluate({"python_full_version": python}):
            yield requirement


@pytest.mark.parametrize(
    ("name", "extra"),
    [("base", ""), ("cpu", ""), ("cpu", "train"), ("gpu", "gpu"), ("dev", "dev"), ("textworld", "textworld")],
)
@pytest.mark.parametrize("python", PYTHONS)
def test_locks_are_within_the_ranges_of_the_package(name: str, extra: str, python: str) -> None:
    there = pins(name, python)
    for requirement in _wanted(extra, python):
        if normal(requirement.name) in WITHOUT - set(there):
            continue
        assert requirement.specifier.contains(there[normal(requirement.name)]), requirement


@pytest.mark.parametrize("name", ["cpu", "dev"])
def test_what_an_installed_package_needs_is_in_the_lock(name: str) -> None:
    """`--no-deps` would leave it out without a word; for every patch release, since some need more than others."""
    for python in PYTHONS:
        environment = {"extra": "", "python_full_version": python, "python_version": python.rpartition(".")[0]}
        there = pins(name, python)
        for package, version in there.items():
            try:
                installed = metadata.distribution(package)
            except metadata.PackageNotFoundError:
                continue
            if installed.version != version:
                continue
            for needed in map(Requirement, installed.requires or ()):
                if needed.marker is None or needed.marker.evaluate(environment):
                    assert normal(needed.name) in there.keys() | WITHOUT, f"{package} needs {needed} (Python {python})"


STRANGER = re.compile(
    r"""pip\s+install\b[^\n#]*?[\s"']anchorage(?![\w./-])   # pip install anchorage, 'anchorage[wandb]'
      | ["']anchorage\s*(?:\[[^]]*\]\s*)?(?:[=<>~!]=|[<>])   # "anchorage>=1" in a list of dependencies
      | ^anchorage\s*(?:\[[^]]*\]\s*)?(?:[=<>~!]=|@)         # anchorage==1 in a requirements file
    """,
    re.MULTILINE | re.VERBOSE,
)


def _text_files() -> Iterator[Path]:
    """Files of the repository that git tracks or would; without git all of them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.splitlines() if listed.returncode == 0 else [str(p) for p in ROOT.rglob("*")]
    for path in (ROOT / name for name in names):
        if path.is_file() and path.suffix in (".py", ".toml", ".txt", ".in", ".md", ".yml", ".yaml", ".sh", ".cff", ""):
            yield path


def test_nothing_installs_the_stranger_s_anchorage() -> None:
    """The name `anchorage` on PyPI belongs to another project; ours is `anchorage-rl`."""
    wrong = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in _text_files()
        if path != Path(__file__)
        for match in STRANGER.finditer(path.read_text(errors="replace"))
    ]
    assert wrong == []
    assert [
        STRANGER.search(text) is None for text in ("pip install anchorage", "x = ['anchorage>=1']", "anchorage==1")
    ] == [False] * 3
    for project in [*ROOT.glob("*/scaffold/template/pyproject.toml"), *ROOT.glob("examples/**/pyproject.toml")]:
        declared = tomllib.loads(project.read_text())["project"]
        listed = list(declared.get("dependencies", ()))
        for extra in declared.get("optional-dependencies", {}).values():
            listed += extra
        assert "anchorage" not in {normal(Requirement(one).name) for one in listed}, project
    names = [name for name in LOCKS if "anchorage" in lock(name)]
    assert names == []
    assert PROJECT["name"] == "anchorage-rl"
