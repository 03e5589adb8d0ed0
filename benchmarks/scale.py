"""A thousand actors: what a run costs Redis, learner and control plane, by the number of its actors.

`python -m benchmarks.scale [--json FILE] [--short] [--actors 1,10,100,1000] [--seconds 30] [--offered 100]`

First, the processor time that Redis spends on each operation beside so many actors (`benchmarks/parts/operations.py`).

Then whole runs. Redis, buffer, dispatcher, intake, prefetcher, supervisor, weight channel and control plane are the
real ones. The actors are simulated, many in a process (`benchmarks/parts/crowd.py`): episodes are waits as long as
recorded ones, whose trajectories are as large (`benchmarks/parts/recorded.py`). Since a thousand actors at the recorded
pace would need a hundred processors to play, times are multiplied so that at most `--offered` trajectories a second
come; the last run has the recorded pace and shows what this machine carries at most, simulated actors included.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from redis import Redis
from rich.console import Console
from rich.table import Table

from anchorage.runs.leases import LeaseKeeper
from anchorage.runs.supervisor import Supervisor
from benchmarks import record
from benchmarks.parts import operations
from benchmarks.parts.collecting import Collecting, CountingBuffer
from benchmarks.parts.crowd import Crowd, Figures, Process
from benchmarks.parts.recorded import MEAN_SECONDS, episode
from env_servers.arguments import positive
from env_servers.arguments import seconds as duration
from env_servers.launch import ServerProcess, start_server
from services.buffer.owner import Ownership, take
from services.codec import encode
from services.config.load import dump_config
from services.config.tree import Config
from services.redis_server import EmbeddedRedis
from services.run_folder import CONFIG_NAME, REDIS_NAME
from services.schemas import TRAIN_STREAM, Task, Ticket

RUN = "scale"
EPISODES, GROUP = 64, 8
OUTSTANDING = 3
"""Episodes that are out, over those in flight: the learner waits for the slowest of the oldest groups."""
PROCESSES = 4
START_S = 300.0
PEAK_ACTORS = 100
RAW_DOCUMENTS = 2000
PAGES = {
    "run": f"/api/v1/runs/{RUN}",
    "actors": f"/api/v1/runs/{RUN}/actors",
    "buffer": f"/api/v1/runs/{RUN}/buffer",
    "leases": f"/api/v1/runs/{RUN}/leases",
    "prometheus": "/metrics",
}
EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Load:
    """One row: so many actors whose episodes take the recorded times multiplied by `pace`."""

    actors: int
    pace: float

    @classmethod
    def of(cls, actors: int, offered: float) -> Load:
        """At most so many trajectories a second, and never faster than recorded."""
        return cls(actors, max(1.0, actors * EPISODES / MEAN_SECONDS / offered))

    @property
    def offered(self) -> float:
        """Trajectories a second, if nothing holds the actors up."""
        return self.actors * EPISODES / (self.pace * MEAN_SECONDS)

    def config(self, folder: Path) -> Config:
        """The run's configuration. An update is due every few seconds, more seldom in a large run."""
        groups = max(2, round(self.offered / GROUP * max(2.0, self.actors / 5)))
        out = OUTSTANDING * self.actors * EPISODES // GROUP
        return Config.model_validate(
            {
                "run": {"name": RUN, "dir": str(folder)},
                "rollout": {"actors": self.actors, "episodes_in_flight": EPISODES},
                "learner": {
                    "updates": 10**6,
                    "groups_per_update": groups,
                    "group_size": GROUP,
                    "max_staleness": max(1, -(-out // groups) - 1),
                },
                "weights": {"channel": "directory"},
            }
        )


class Run:
    """A run with simulated actors, which is measured while it goes."""

    def __init__(self, load: Load, folder: Path) -> None:
        self._load = load
        self._config = load.config(folder)
        self._exit = ExitStack()

    def __enter__(self) -> Run:
        with ExitStack() as opened:
            self._exit = opened
            self._open()
            self._exit = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _open(self) -> None:
        config, enter = self._config, self._exit.enter_context
        config.run.folder.mkdir(parents=True)
        (config.run.folder / CONFIG_NAME).write_text(dump_config(config))
        self._redis = enter(EmbeddedRedis(config.run.folder / REDIS_NAME))
        connected = CountingBuffer.connect(self._redis.url, RUN, config.buffer)
        assert isinstance(connected, CountingBuffer)
        self.buffer = connected
        self._exit.callback(self.buffer.close)
        owner = take(self.buffer, RUN, "benchmark", config.buffer.owner_lease_s)
        self.buffer.own(owner)
        self._exit.callback(Ownership(self.buffer, config.buffer.owner_lease_s).release)
        self.buffer.set_state("running")
        self._keeper = LeaseKeeper(config, self._redis.url, owner)
        self._exit.callback(self._keeper.close)
        supervisor = Supervisor([self._redis.ensure_running, self._keeper.check])
        supervisor.start()
        self._exit.callback(supervisor.close)
        self._control = enter(self._control_plane())
        self._learner = Collecting(config, self.buffer)
        self._learner.publish()
        self._learner.start()
        self._exit.callback(self._learner.stop)
        self._processes = [self._process(owner, part) for part in _parts(self._load.actors)]
        self._wait_until_busy()

    def _control_plane(self) -> ServerProcess:
        ready = self._config.run.dir / "control.url"
        command = [sys.executable, "-m", "anchorage.cli.main", "control", str(self._config.run.dir), "--port", "0"]
        command += ["--requests-per-minute", "1000000", "--ready-file", str(ready)]
        return start_server(command, ready, timeout_s=START_S)

    def _process(self, owner: Any, part: range) -> Process:
        crowd = Crowd(self._config.model_dump_json(), self._redis.url, owner, part.start, len(part), self._load.pace)
        process = Process(crowd)
        self._exit.callback(process.end)
        return process

    def _wait_until_busy(self) -> None:
        """Wait until nearly every actor plays nearly as many episodes as it may. Raises TimeoutError."""
        deadline = time.monotonic() + START_S
        while True:
            episodes = [facts.get("episodes") for facts in self.buffer.actors().values()]
            # Of those that it may play, an actor has just stored some, and is about to lease others.
            busy = sum(isinstance(count, int) and count >= 0.75 * EPISODES for count in episodes)
            if busy >= 0.9 * self._load.actors:
                return
            self._check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{busy} of {self._load.actors} simulated actors play after {START_S:g} s")
            time.sleep(0.2)

    def _check(self) -> None:
        if self._learner.error is not None:
            raise self._learner.error

    def measure(self, seconds: float) -> dict[str, float]:
        """The figures of the next `seconds` seconds, then those of the end of the run, which balance or raise."""
        taken = len(self._learner.tickets)
        servers = {"redis": self._redis.pid, "learner": os.getpid(), "control": self._control.pid}
        before = {name: _cpu_s(pid) for name, pid in servers.items()}
        for process in self._processes:
            process.ask("begin")
        began = time.monotonic()
        self._learner.publish()
        pages, most_bytes, updates = self._visit(began + seconds)
        spent = time.monotonic() - began
        for process in self._processes:
            process.ask("report")
        shares = {f"{name}_processors": (_cpu_s(pid) - before[name]) / spent for name, pid in servers.items()}
        found = [process.figures() for process in self._processes]
        stored = sum(len(figures.store_s) for figures in found)
        figures = {
            "actors": self._load.actors,
            "pace": self._load.pace,
            "offered_per_s": self._load.offered,
            "stored_per_s": stored / spent,
            "taken_per_s": (len(self._learner.tickets) - taken) / spent,
            "updates": updates,
            **_times("lease", [second for one in found for second in one.lease_s]),
            **_times("store", [second for one in found for second in one.store_s]),
            "idle_leases_per_s": sum(one.idle for one in found) / spent,
            **shares,
            "actors_processors": sum(one.cpu_s for one in found) / spent,
            "redis_mib": most_bytes / 2**20,
            "looks_per_s": sum(one.looks for one in found) / spent,
            **self._readers(found, began),
            **{f"page_{name}_ms": float(np.median(times)) for name, times in pages.items()},
        }
        return figures | self._end()

    def _visit(self, until: float) -> tuple[dict[str, list[float]], int, int]:
        """Get every page again and again. Returns milliseconds by page, the largest memory of Redis, and updates."""
        times: dict[str, list[float]] = {name: [] for name in PAGES}
        most, updates = 0, self._learner.updates
        with httpx.Client(base_url=self._control.url, timeout=60.0, trust_env=False) as client:
            while time.monotonic() < until:
                for name, path in PAGES.items():
                    began = time.perf_counter()
                    client.get(path).raise_for_status()
                    times[name].append(1000 * (time.perf_counter() - began))
                most = max(most, self.buffer.server().used_bytes)
                self._check()
                time.sleep(EVERY_S)
        return times, most, self._learner.updates - updates

    def _readers(self, found: Sequence[Figures], began: float) -> dict[str, float]:
        """How many actors loaded the newest version that all could load, and after how many seconds."""
        loads: dict[str, list[float]] = {}
        for locator, at in (load for figures in found for load in figures.loads):
            if (announced := self._learner.published.get(locator)) is not None and announced >= began:
                loads.setdefault(locator, []).append(at - announced)
        lags = max(loads.values(), key=len, default=[])
        return {"readers": len(lags), "readers_p50_s": _quantile(lags, 0.5), "readers_p99_s": _quantile(lags, 0.99)}

    def _end(self) -> dict[str, float]:
        """Drain the actors, balance the books, and time what a resumed run would check. Raises ValueError."""
        for process in self._processes:
            process.ask("stop")
        found = [process.figures() for process in self._processes]
        self._learner.stop()
        self._check()
        stored = sum(figures.results[name] for figures in found for name in ("STORED", "COMPLETED"))
        refused = sum(figures.results[name] for figures in found for name in ("DUPLICATE", "UNKNOWN"))
        outcomes = {name: sum(figures.outcomes[name] for figures in found) for name in ("failed", "abandoned")}
        contents = self.buffer.contents()
        places = [ticket.place for group in contents for ticket in group.tickets]
        kept = places.count("stored") + len(self._learner.tickets)
        whole = len(places) == GROUP * len(contents) and self.buffer.cancelled(TRAIN_STREAM) == {}
        if stored != kept or refused or any(outcomes.values()) or not whole:
            raise ValueError(
                f"{stored} trajectories stored, {refused} refused, {kept} found, {outcomes}, whole: {whole}"
            )
        began = time.perf_counter()
        self.buffer.check()
        mended = self.buffer.mend()
        took = time.perf_counter() - began
        if mended:
            raise ValueError(f"groups are not consistent: {mended}")
        return {
            "trajectories": stored,
            "tickets": len(places),
            "leases_lost": self.buffer.expired + self._keeper.expired,
            "resume_check_s": took,
        }


def _parts(actors: int) -> Iterator[range]:
    """The numbers of the actors of each process."""
    count = min(PROCESSES, actors)
    ends = [actors * number // count for number in range(count + 1)]
    return (range(first, last) for first, last in itertools.pairwise(ends))


def _cpu_s(pid: int | None) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _times(name: str, seconds: Sequence[float]) -> dict[str, float]:
    return {f"{name}_{label}_ms": 1000 * _quantile(seconds, part) for label, part in (("p50", 0.5), ("p99", 0.99))}


def _quantile(values: Sequence[float], part: float) -> float:
    return float(np.quantile(values, part)) if values else 0.0


def raw_redis(folder: Path) -> dict[str, float]:
    """`SET` and `GET` of such documents by one client, one command at a time, and Redis' processor time for both."""
    task = Task(env="e", split="train", index=0)
    tickets = [Ticket(group=n, member=0, group_size=1, task=task, seed=n) for n in range(RAW_DOCUMENTS)]
    documents = [encode(episode(ticket, RUN, 0)) for ticket in tickets]
    with EmbeddedRedis(folder) as server, Redis.from_url(server.url) as client:
        began, cpu = time.perf_counter(), _cpu_s(server.pid)
        for number, document in enumerate(documents):
            client.set(f"raw:{number}", document)
        for number in range(len(documents)):
            client.get(f"raw:{number}")
        spent, cpu = time.perf_counter() - began, _cpu_s(server.pid) - cpu
    return {"trajectories_per_s": len(documents) / spent, "redis_us_per_trajectory": 1e6 * cpu / len(documents)}


def costs(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """What each trajectory, each actor and the run itself cost, by least squares over at least four rows.

    processors = a · stored_per_s + b · actors + c

    Example: a = 0.3 ms, b = 0.2 ms a second, c = 0.01: 100 actors that store 50 trajectories a second need 0.045.
    """
    loads = np.array([[row["stored_per_s"], row["actors"], 1.0] for row in rows])
    found: dict[str, float] = {}
    for name in ("redis", "learner", "actors"):
        processors = np.array([row[f"{name}_processors"] for row in rows])
        (trajectory, actor, run), *_ = np.linalg.lstsq(loads, processors, rcond=None)
        found[f"{name}_us_per_trajectory"] = 1e6 * float(trajectory)
        found[f"{name}_us_per_actor_and_s"] = 1e6 * float(actor)
        found[f"{name}_us_per_s"] = 1e6 * float(run)
    return found


def measure(folder: Path, loads: Sequence[Load], seconds: float, note: Callable[[str], None]) -> dict[str, Any]:
    """Measure raw Redis, then each load in a run of its own."""
    figures: dict[str, Any] = {"machine": record.machine(), "raw": raw_redis(folder / "raw"), "rows": []}
    with EmbeddedRedis(folder / "operations") as server:
        figures["operations_us"] = {}
        for actors in sorted({load.actors for load in loads}):
            note(f"operations beside {actors} actors")
            figures["operations_us"][actors] = operations.measure(server, actors, EPISODES)
    for number, load in enumerate(loads):
        note(f"{load.actors} actors, recorded times x {load.pace:.1f}")
        with Run(load, folder / str(number)) as run:
            figures["rows"].append(run.measure(seconds))
    if len(loads) > 3:
        figures["costs"] = costs(figures["rows"])
    return figures


def show(figures: dict[str, Any], console: Console) -> None:
    """Print a table with a column a load."""
    table = Table("figure", *(f"{row['actors']:,.0f} actors" for row in figures["rows"]))
    for name in figures["rows"][0]:
        table.add_row(name, *(f"{row[name]:,.3f}" for row in figures["rows"]))
    console.print(table)
    beside = figures["operations_us"]
    costly = Table("Redis' processor time (µs)", *(f"{actors:,} actors" for actors in beside))
    for name in next(iter(beside.values())):
        costly.add_row(name, *(f"{found[name]:,.0f}" for found in beside.values()))
    console.print(costly)
    for part in ("raw", "costs"):
        for name, value in figures.get(part, {}).items():
            console.print(f"{part}: {name} {value:,.1f}")


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _counts(text: str) -> list[int]:
    return [positive(number) for number in text.split(",")]


def _rate(text: str) -> float:
    rate = float(text)
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
    return rate


def main(arguments: Sequence[str] | None = None) -> None:
    parser = record.parser("Measure what a run costs, by the number of its actors.")
    parser.add_argument("--short", action="store_true", help="1 and 4 actors for a few seconds only")
    parser.add_argument("--actors", type=_counts, default="1,10,100,1000", help="numbers of actors, with commas")
    parser.add_argument("--seconds", type=duration, default=30.0, help="measure each for so long")
    parser.add_argument(
        "--offered", type=_rate, default=100.0, help="most trajectories a second, in all but the last row"
    )
    options = parser.parse_args(arguments)
    actors = [1, 4] if options.short else options.actors
    loads = [Load.of(count, options.offered) for count in actors]
    if not options.short:
        loads.append(Load(PEAK_ACTORS, 1.0))
    console = Console()
    with _folder() as folder:
        figures = measure(folder, loads, 4.0 if options.short else options.seconds, console.print)
    show(figures, console)
    record.keep(figures, options.json)


if __name__ == "__main__":
    main()
