"""A training run on a Ray cluster of two nodes, every process of which can be found and killed.

The head node holds the learner and one rollout actor; the second node holds the other one. The run starts its Redis
and its environment server itself, as a user's does; like any supervisor this starts the run again, with `--resume`,
when its process has died.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

from anchorage.cli.attach import attach
from services.buffer import Buffer
from services.errors import AnchorageError
from tests.chaos.history import Entry, read_ledger

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.2


class RunEnded(Exception):
    """The run came to its end while something was waited for."""


class Nodes:
    """A Ray cluster on this machine: a head, and further nodes of one rollout place each."""

    def __init__(self, head_places: int = 1) -> None:
        # A cluster that others join knows them by a token; the run inherits it.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": os.cpu_count(),
                "resources": {"learner": 1, "rollout": head_places},
                "object_store_memory": 200 * 2**20,
                "include_dashboard": False,
            },
        )
        self._others: list[Any] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def others(self) -> int:
        """Nodes besides the head."""
        return len(self._others)

    def add(self) -> None:
        self._others.append(
            self._cluster.add_node(num_cpus=1, resources={"rollout": 1}, object_store_memory=100 * 2**20)
        )

    def kill(self) -> None:
        """`kill -9` of the newest node: its raylet, and with it all its workers."""
        node = self._others.pop()
        self._cluster.remove_node(node, allow_graceful=False)

    def stop(self) -> None:
        """The newest node leaves in order."""
        self._cluster.remove_node(self._others.pop(), allow_graceful=True)

    def close(self) -> None:
        self._cluster.shutdown()


class Run:
    """`anchorage train`, started again with `--resume` whenever it dies. Use as a context manager."""

    def __init__(self, name: str, folder: Path, overrides: Sequence[str], address: str | None) -> None:
        self.name = name
        self.runs = folder
        self.folder = folder / name
        self._overrides = [*overrides, f"run.name={name}", f"run.dir={folder}"]
        self._environment = {key: value for key, value in os.environ.items() if key != "REDIS_URL"}
        if address is not None:
            self._environment["RAY_ADDRESS"] = address
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self.starts = 0

    def __enter__(self) -> Run:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = (self.folder / "output.log").open("wb")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for trainer in self.processes("trainer"):
            for process in [trainer, *descendants(trainer)]:
                process.kill()
        assert self._log is not None
        self._log.close()

    def start(self) -> None:
        resume = ["--resume"] if self.starts else []
        self.starts += 1
        self._process = subprocess.Popen(
            [sys.executable, "-m", "anchorage.cli.main", "train", *self._overrides, *resume],
            cwd=ROOT,
            env=self._environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def keep_running(self) -> bool:
        """Start it again if it has died; False when it has come to its end. RuntimeError when it gives up."""
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return True
        if code == 0:
            return False
        if code > 0:
            raise RuntimeError(f"the run gave up with exit code {code}:\n{self.output()[-2000:]}")
        self.start()
        return True

    def output(self) -> str:
        return (self.folder / "output.log").read_text(errors="replace")

    def ledger(self) -> list[Entry]:
        return read_ledger(self.folder / "ledger.jsonl")

    def update(self) -> int:
        return max((entry.update for entry in self.ledger()), default=0)

    def ask(self, question: Callable[[Buffer], Any], default: Any = None) -> Any:
        """Ask the run's buffer; `default` while it cannot be reached."""
        try:
            _, buffer = attach(self.name, self.runs)
        except AnchorageError:
            return default
        try:
            return question(buffer)
        except AnchorageError:
            return default
        finally:
            buffer.close()

    def playing(self) -> dict[str, dict[str, object]]:
        """The rollout actors that play, with their heartbeats."""
        actors = self.ask(lambda buffer: buffer.actors(), {})
        return {name: facts for name, facts in actors.items() if facts["state"] == "playing" and alive(facts)}

    def environment_answers(self) -> bool:
        try:
            url = next(self.folder.glob("*.url")).read_text().strip()
            return httpx.get(f"{url}/info", timeout=2.0).status_code == 200
        except (StopIteration, OSError, httpx.HTTPError):
            return False

    def processes(self, kind: str) -> list[psutil.Process]:
        """Living processes of a kind: trainer, rank, redis, environment, actor, engine."""
        if kind == "trainer":
            return [psutil.Process(self._process.pid)] if self._process and self._process.poll() is None else []
        if kind == "actor":
            return [psutil.Process(int(str(facts["pid"]))) for facts in self.playing().values()]
        words = {
            "rank": ("ray::Rank",),
            "redis": ("valkey-server", "redis-server"),  # of the wheel, or one of the PATH
            "environment": ("env_servers",),
            "engine": ("actors.engine.server",),
        }
        return [one for one in descendants(psutil.Process()) if any(word in command(one) for word in words[kind])]


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """All below a process: never somebody else's."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def alive(facts: dict[str, object]) -> bool:
    return psutil.pid_exists(int(str(facts["pid"])))


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def wait_for(condition: Callable[[], bool], timeout_s: float, run: Run) -> float:
    """Seconds until the condition holds; the run is kept running meanwhile.

    Raises:
        TimeoutError: it does not hold in time.
        RunEnded: the run came to its end before.
    """
    began = time.monotonic()
    while not condition():
        if not run.keep_running():
            raise RunEnded
        if time.monotonic() - began > timeout_s:
            raise TimeoutError(f"waited {timeout_s:g} s in vain")
        time.sleep(POLL_S)
    return time.monotonic() - began
