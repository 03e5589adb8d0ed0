"""What the images are made of: pinned requirements that agree with each other, and no file that should not be there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.requirements import normal, pins

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_THE_REST = """
import sys
refused = set(sys.argv[1].split())

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"{name} is not in the image", name=name)

sys.meta_path.insert(0, Refuse())
import env_servers.__main__, env_servers.alfworld.environment, env_servers.webshop.environment
import uvloop, httptools, websockets
from env_servers.server.app import create_app
"""


def test_the_environment_servers_need_nothing_beyond_their_requirements() -> None:
    there = set(pins("env"))
    rest = {
        module
        for module, owners in packages_distributions().items()
        if not any(normal(owner) in there for owner in owners) and not module.startswith(("_", "env_servers"))
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_REST, " ".join(rest)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_build_sees_only_what_it_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = set()
    for dockerfile in (ROOT / "deploy").glob("Dockerfile*"):
        for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile.read_text(), re.MULTILINE):
            copied |= set(sources.split())
    assert all(any(source == path or source.startswith(f"{path}/") for path in allowed) for source in copied)
    assert not any("secret" in path for path in allowed)


def test_secrets_are_kept_out_of_history_and_readable_by_their_owner_alone(tmp_path: Path) -> None:
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    folder = tmp_path / "secrets"
    for _ in range(2):  # the second time nothing is replaced
        subprocess.run([ROOT / "deploy" / "secrets.sh", folder], check=True, capture_output=True)
        written = {path.name: path.read_text() for path in folder.iterdir()}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    values = re.findall(r"^\w+=([0-9a-f]{64})$", "\n".join(written.values()), re.MULTILINE)
    assert len(values) == len(set(values)) == 6
    again = subprocess.run([ROOT / "deploy" / "secrets.sh", folder], check=True, capture_output=True, text=True)
    assert again.stdout == ""
    assert {path.name: path.read_text() for path in folder.iterdir()} == written


def test_no_secret_is_written_in_a_deployment_file() -> None:
    for path in [*ROOT.glob("docker-compose*.yml"), *(ROOT / "deploy").rglob("*")]:
        if path.is_file() and path.suffix in (".yml", ".yaml", ".sh", ".json", "") and "secrets/" not in str(path):
            assert not re.search(r"(TOKEN|PASSWORD)\w*['\"]?\s*[:=]\s*['\"]?[0-9A-Za-z]{16,}", path.read_text()), path


def test_a_container_without_its_secret_says_so_in_one_line() -> None:
    environment = {"PATH": os.environ["PATH"]}
    for script, role in (("entrypoint.sh", "actor"), ("entrypoint.sh", "environment"), ("redis.sh", "serve")):
        done = subprocess.run([ROOT / "deploy" / script, role], env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        assert "make secrets" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_secrets_may_come_from_files(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("from-a-file\n")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$ANCHORAGE_ENV_TOKEN $*"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ANCHORAGE_ENV_TOKEN_FILE": str(token)}
    done = subprocess.run(
        [ROOT / "deploy" / "entrypoint.sh", "environment", "alfworld"], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "from-a-file -m env_servers alfworld --host 0.0.0.0 --port 8001\n"
