"""The cluster of docker-compose.yml, operated with compose commands and the control plane's API.

Invariants
- It imports the standard library only, and so runs on a bare machine with a Docker engine.
- It uses its own project name, volumes and ports, and never touches a cluster in use.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "anchorage-test"
ADDRESS = "127.0.0.1:18080"
SECRETS = ROOT / "deploy" / "secrets"
BUILT = ("redis", "alfworld", "webshop", "head", "control", "actor", "learner", "trainer")
POLL_S = 1.0


class Failed(Exception):
    """A check failed. The message is one line."""


def engine_missing() -> str | None:
    """Return why the test cannot run; None if a Docker engine and compose are available."""
    docker = shutil.which("docker")
    if docker is None:
        return "docker is not installed"
    if subprocess.run([docker, "info"], capture_output=True).returncode != 0:
        return "the Docker engine is not running"
    return None if compose_command() else "neither docker-compose nor `docker compose` is installed"


def compose_command() -> list[str]:
    """Return the command of compose; empty if it is not installed."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    return ["docker", "compose"] if plugin else []


class Cluster:
    """One project of compose. Writes the override file and the log of compose's output to `folder`."""

    def __init__(self, folder: Path, run: str, overrides: Sequence[str]) -> None:
        self.run = run
        self.said: list[str] = []
        """Logs of trainers whose containers no longer exist."""
        self._log = folder / "compose.log"
        override = folder / "override.yml"
        # The default bridge may have no external access: builds use the host's network. Nothing else is overridden.
        services = "".join(f"  {name}: {{build: {{network: host}}}}\n" for name in BUILT)
        override.write_text(f'version: "3.8"\nservices:\n{services}')
        files = ["-f", str(ROOT / "docker-compose.yml"), "-f", str(override)]
        self._compose = [*compose_command(), "-p", PROJECT, "--project-directory", str(ROOT), *files]
        own = {"ANCHORAGE_PUBLISH": ADDRESS, "ANCHORAGE_OVERRIDES": " ".join([f"run.name={run}", *overrides])}
        self._environment = {**os.environ, **own, "COMPOSE_PROFILES": "train"}

    def compose(self, *arguments: str, timeout_s: float = 900.0) -> str:
        """Return the standard output of a compose command. Raises Failed with the last line of its error."""
        done = subprocess.run(
            [*self._compose, *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        with self._log.open("a") as log:
            log.write(f"$ {' '.join(arguments)}\n{done.stdout}{done.stderr}\n")
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise Failed(f"compose {arguments[0]} failed with exit code {done.returncode}: {last[:300]}")
        return done.stdout

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "-q", service).split()

    def container(self, service: str) -> dict[str, Any]:
        """Return the engine's description of the service's first container."""
        names = self.containers(service)
        if not names:
            raise Failed(f"{service} has no container")
        return inspect(names[0])

    def crash(self, service: str) -> None:
        """Kill the first container's main process, so that the engine sees a crash and not a requested stop."""
        found = self.container(service)
        try:
            os.kill(int(found["State"]["Pid"]), signal.SIGKILL)
        except (PermissionError, ProcessLookupError):  # the engine is on another host: kill and restart through it
            docker("kill", found["Id"])
            docker("start", found["Id"])

    def healthy(self, service: str) -> bool:
        states = [inspect(name)["State"] for name in self.containers(service)]
        return bool(states) and all(s["Running"] and s["Health"]["Status"] == "healthy" for s in states)

    def ask(self, path: str, token: str | None = None) -> Any:
        """Return the control plane's response to a GET; None while it is unavailable. Raises HTTPError if denied."""
        request = urllib.request.Request(f"http://{ADDRESS}{path}")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code in (404, 429, 500, 503):
                return None
            raise
        except (OSError, ValueError):
            return None

    def look(self, thing: str = "") -> dict[str, Any]:
        """Return a resource of the run; empty while it does not exist."""
        found = self.ask(f"/api/v1/runs/{self.run}{thing}", secret("control", "ANCHORAGE_CONTROL_READ_TOKEN"))
        return dict(found or {})

    def update(self) -> int:
        return int(self.look().get("update") or 0)

    def playing(self) -> set[str]:
        """Return the hosts whose rollout actors are playing."""
        actors = self.look("/actors").get("actors", [])
        return {actor["host"] for actor in actors if actor["state"] == "playing"}

    def file(self, name: str) -> str:
        """Return a file of the run's folder, read in the control plane's container."""
        return self.compose("exec", "-T", "control", "cat", f"runs/{self.run}/{name}")

    def keep_logs(self) -> None:
        with contextlib.suppress(Failed, subprocess.TimeoutExpired):
            self.compose("logs", "--no-color", "--tail", "300")


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True, timeout=120).stdout


def inspect(thing: str) -> dict[str, Any]:
    return dict(json.loads(docker("inspect", thing))[0])


def secret(file: str, name: str) -> str:
    for line in (SECRETS / f"{file}.env").read_text().splitlines():
        variable, _, value = line.partition("=")
        if variable == name:
            return value
    raise Failed(f"deploy/secrets/{file}.env does not set {name}")


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait until the condition holds. Raises Failed if it does not within `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"timed out after {timeout_s:.0f} s waiting until {what}")
        time.sleep(POLL_S)
