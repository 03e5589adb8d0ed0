"""Process that forks agent processes: `python -I zygote.py DESCRIPTOR PARENT [MODULE …]`, started by `command.py`.

It imports the modules once; each agent is a fork, which costs a tenth of a fresh interpreter that imports them. It runs
in the interpreter of the agent's command, which may lack every package of this project: standard library only.

    actor to zygote    {"run": id, "argv": [...], "environment": {...}, "folder": path, "limits": {...}}, one descriptor
                       {"signal": number, "run": id}
    zygote to actor    {"ready": null or what failed}, once
                       {"started": id, "pid": pid}, {"exited": id, "code": code}

Messages are JSON, one in each packet of a SOCK_SEQPACKET socket.

Invariants
- It ends with the actor, however that ends: its end of the socket is closed, and the kernel sends SIGTERM. Before it
  ends it kills every agent's process group. If it is killed itself, the kernel kills the agents.
- An agent has a session and a process group of its own. When its main process ends, the rest of the group is killed.
- A process id is signalled only while its process has not been waited for, so it cannot be another's by then.
- An agent inherits no descriptor but its output, and no variable but those of its message.
- One thread: it forks, and a fork copies only the thread that calls it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from typing import Any

PR_SET_PDEATHSIG = 1
PACKET_BYTES = 2**18
PYTHON = "-python"
"""First member of an argument list: run what follows (`-m module …` or a file) in a fork of this interpreter."""


def _die_with_parent(signal_number: int, parent: int) -> None:
    """Have the kernel send a signal when the parent ends; raises OSError if it is gone already."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        raise OSError("the parent process has ended")


class Zygote:
    """Serves one actor. Call `serve` once.

    Args:
        link: socket to the actor.
    """

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._running: dict[str, int] = {}  # process ids that have not been waited for
        self._stopped = False
        self._wake, wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        # A dying actor closes the link and has SIGTERM sent at almost the same time. A handler that raised could cut
        # short the killing of the agents, so this one only ends the loop.
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        self._stopped = True

    def serve(self) -> None:
        """Serve until the actor closes its end of the link, or SIGTERM."""
        try:
            while not self._stopped:
                ready, _, _ = select.select([self._link.fileno(), self._wake], [], [])
                if self._wake in ready:
                    self._drain_wake()
                    self._reap()
                if self._link.fileno() in ready and not self._receive():
                    return
        finally:
            for pid in self._running.values():
                _signal_group(pid, signal.SIGKILL)

    def _drain_wake(self) -> None:
        try:
            while os.read(self._wake, 4096):
                pass
        except BlockingIOError:
            pass

    def _receive(self) -> bool:
        """Handle one message. Returns whether to continue."""
        packet, descriptors, _, _ = socket.recv_fds(self._link, PACKET_BYTES, 1)
        if not packet:
            return False
        message = json.loads(packet)
        if "signal" in message:
            pid = self._running.get(message["run"])
            if pid is not None:
                _signal_group(pid, message["signal"])
            return True
        try:
            self._start(message, descriptors[0])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _start(self, message: dict[str, Any], output: int) -> None:
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os.write(output, f"cannot start the agent: {error.strerror}\n".encode())
            self._send({"exited": message["run"], "code": 127})
            return
        if pid == 0:
            code = 127
            try:
                code = _run(message, output, parent)
            finally:
                os._exit(code)
        self._running[message["run"]] = pid
        self._send({"started": message["run"], "pid": pid})

    def _reap(self) -> None:
        for run, pid in list(self._running.items()):
            # Not reaped yet: its process id, which is that of its group, cannot be another process's.
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            _signal_group(pid, signal.SIGKILL)
            del self._running[run]
            _, status = os.waitpid(pid, 0)
            self._send({"exited": run, "code": os.waitstatus_to_exitcode(status)})

    def _send(self, message: dict[str, Any]) -> None:
        self._link.send(json.dumps(message).encode())


def _signal_group(pid: int, number: int) -> None:
    """Signal a process that has not been waited for, and its group; alone where it has not called setsid yet."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _run(message: dict[str, Any], output: int, parent: int) -> int:
    """Become the agent, in the forked process; returns its exit code."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    _die_with_parent(signal.SIGKILL, parent)
    quiet = os.open(os.devnull, os.O_RDONLY)
    os.dup2(quiet, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, _highest_descriptor() + 1)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(message["environment"])
    os.chdir(message["folder"])
    for name, limit in message["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    argv = message["argv"]
    if argv[0] == PYTHON:
        return _run_python(argv[1:])
    try:
        os.execvpe(argv[0], argv, dict(message["environment"]))
    except OSError as error:
        print(f"cannot execute {argv[0]}: {error.strerror}", file=sys.stderr)
        return 127


def _highest_descriptor() -> int:
    return max(map(int, os.listdir("/proc/self/fd")))


def _run_python(argv: list[str]) -> int:
    """Run a script or module as `python` would; returns its exit code."""
    code = 0
    try:
        if argv[0] == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        code = _exit_code(error)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
    return code


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _preload(modules: list[str]) -> str | None:
    """Import the modules; returns what failed, in one line."""
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException as error:
            return f"cannot import {name}: {type(error).__name__}: {error}".splitlines()[0]
    if threading.active_count() > 1:
        return f"an import started a thread, which a fork would lose: leave one of {', '.join(modules)} out"
    return None


def _exit_at_once(number: int, frame: object) -> None:
    raise SystemExit(0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit_at_once)  # there are no agents yet
    with socket.socket(fileno=int(sys.argv[1])) as link:
        link.set_inheritable(False)
        _die_with_parent(signal.SIGTERM, int(sys.argv[2]))
        failed = _preload(sys.argv[3:])
        gc.collect()
        gc.freeze()  # the garbage collector of a fork would touch, and so copy, every page
        link.send(json.dumps({"ready": failed}).encode())
        Zygote(link).serve()


if __name__ == "__main__":
    main()
