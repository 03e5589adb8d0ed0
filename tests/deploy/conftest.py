"""The Helm chart's documents, rendered with the template functions that Helm itself has (Go, sprig), without Helm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests import needs

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "anchorage"
SOURCE = Path(__file__).parent / "render" / "main.go"
GOPATH = Path("/usr/share/gocode")  # where Debian's packages of Go libraries are
LIBRARIES = {
    "github.com/Masterminds/sprig": "golang-github-masterminds-sprig-dev",
    "sigs.k8s.io/yaml": "golang-k8s-sigs-yaml-dev",
}

RELEASE = "trial"  # no name that the chart itself has


class Render(Protocol):
    def __call__(self, values: Mapping[str, Any], release: str = RELEASE) -> list[dict[str, Any]]: ...


@pytest.fixture(scope="session")
def render(tmp_path_factory: pytest.TempPathFactory) -> Render:
    """The documents of a release with the given values over the defaults; ValueError: what a template said."""
    missing = [package for path, package in LIBRARIES.items() if not (GOPATH / "src" / path).is_dir()]
    if shutil.which("go") is None:
        missing.append("golang-go")
    if missing:
        pytest.skip(needs.debian(*sorted(missing)))
    program = tmp_path_factory.mktemp("render") / "render"
    subprocess.run(
        ["go", "build", "-o", program, SOURCE],
        env={**os.environ, "GO111MODULE": "off", "GOPATH": str(GOPATH), "GOFLAGS": ""},
        check=True,
    )

    def documents(values: Mapping[str, Any], release: str = RELEASE) -> list[dict[str, Any]]:
        done = subprocess.run(
            [program, CHART, release], input=json.dumps(values), capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise ValueError(done.stderr)
        rendered: list[dict[str, Any]] = json.loads(done.stdout)
        return rendered

    return documents
