"""Child processes that cannot outlive their parent, and TCP ports that stay free until their server listens.

`env_servers` may import nothing of ours and has its own (`env_servers/launch.py`).

Invariants
- The kernel kills a child (SIGKILL) as soon as the *thread* that started it exits, however that thread ends. So start
  children from a thread that lives as long as they are needed.
- Nothing of ours runs between fork and exec: `preexec_fn` can deadlock in a process with several threads.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

# PR_SET_PDEATHSIG is 1; it survives exec. The parent may have died before it was set, hence the second check. The pipe
# closes with a successful exec, and otherwise carries the reason.
_BOUND_TO_PARENT = """
import ctypes, os, signal, sys
pipe, parent = int(sys.argv[1]), int(sys.argv[2])
os.set_inheritable(pipe, False)
try:
    if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        os._exit(1)
    os.execvp(sys.argv[3], sys.argv[3:])
except OSError as error:
    os.write(pipe, str(error.errno).encode())
    os._exit(1)
"""


def start(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    stdin: int = subprocess.DEVNULL,
    output: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a child process that the kernel kills when the calling thread exits. Returns once it executes `command`.

    It has a session of its own, so the terminal's Ctrl-C reaches only its parent, which then stops it.

    Args:
        command: the program, looked up on PATH, and its arguments.
        environment: variables set in addition to those of this process.
        cwd: its working directory; by default this process's.
        pass_fds: descriptors that it inherits under the same numbers.
        stdin: as for `subprocess.Popen`.
        output: receives standard output and standard error; by default they are this process's.

    Raises:
        OSError: `command` cannot be executed, `cwd` cannot be used, or there is no room for a process.
    """
    report, reporter = os.pipe()
    with open(report, "rb") as failure:
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOUND_TO_PARENT, str(reporter), str(os.getpid()), *command],
                cwd=cwd,
                env=os.environ | (environment or {}),
                stdin=stdin,
                stdout=output,
                stderr=output,
                pass_fds=[*pass_fds, reporter],
                start_new_session=True,
            )
        finally:
            os.close(reporter)
        try:
            code = int(failure.read() or 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
    if code:
        child.wait()
        raise OSError(code, os.strerror(code), command[0])
    return child


def stop(process: subprocess.Popen[bytes], grace_s: float) -> int:
    """Send SIGTERM, and SIGKILL when the process has not ended within `grace_s` seconds; its exit code. Idempotent."""
    if process.poll() is None:
        process.terminate()
    return wait_or_kill(process, grace_s)


def wait_or_kill(process: subprocess.Popen[bytes], grace_s: float) -> int:
    """Wait for a process that has been asked to end, and kill it after `grace_s` seconds; its exit code."""
    try:
        return process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


class ReservedPort:
    """A free TCP port that the kernel gives to nobody else; `with ReservedPort(host) as port: … port.number`.

    Its socket is bound but does not listen. Linux then lets a server that sets SO_REUSEADDR (Redis, torch's TCPStore,
    asyncio) listen on the same port, and assigns the port to no other socket. Close it once that server listens.
    """

    def __init__(self, host: str = "") -> None:
        """`host`: address of the interface; by default all of IPv4. Raises OSError without a free port."""
        self._socket = socket.socket()
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, 0))
        except BaseException:
            self._socket.close()
            raise
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give the port back. Idempotent."""
        self._socket.close()

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
