"""The actor's end of agent processes: starts, ends and listens to one for each episode.

A process is forked by a zygote (`zygote.py`), which runs in the interpreter of the agent's command.

Invariants
- An agent gets a fixed set of variables and those that `agent.pass_environment` names: nothing else of the actor's
  environment, which holds the run's secrets.
- Its home, its temporary files and its working directory are an empty folder of its own, removed at its end.
- Ending it: SIGTERM to its process group, after `GRACE_S` SIGKILL. Nobody waits for it but `close`.
- Of its output the last `OUTPUT_BYTES` are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.harness import zygote
from services.config.agent import AgentConfig
from services.errors import AnchorageError

logger = logging.getLogger(__name__)

GRACE_S = 5.0
READY_S = 300.0
OUTPUT_BYTES = 64 * 1024
OUTPUT_S = 2.0
"""How long the rest of a process's output is read after it has exited."""
SHOWN_LINES = 5
SHOWN_CHARS = 600
MOST_FILES = 1024
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_PYTHON = re.compile(r"python(3(\.\d+)?)?")


class AgentUnavailable(AnchorageError):
    """No agent process can be started on this machine; the message is one line."""


class AgentProcess:
    """One process.

    Attributes:
        exited: its exit code, negative for a signal; None if the zygote was lost, and the process with it.
        pid: None before it has started.
        silent: set once nothing more can be written to its output.
    """

    def __init__(self, run: str, folder: Path) -> None:
        self.run = run
        self.folder = folder
        self.pid: int | None = None
        self.exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self.silent = asyncio.Event()
        self._output = bytearray()

    def wrote(self, data: bytes) -> None:
        """Keep what it wrote."""
        self._output += data
        if len(self._output) > 2 * OUTPUT_BYTES:
            del self._output[:-OUTPUT_BYTES]

    def output(self) -> str:
        """The end of what it has written to standard output and standard error."""
        return self._output[-OUTPUT_BYTES:].decode(errors="replace")

    def last_words(self) -> str:
        """The last lines of its output as one line, for an error message; empty without output."""
        lines = [" ".join(line.split()) for line in self.output().splitlines()]
        return " | ".join([line for line in lines if line][-SHOWN_LINES:])[-SHOWN_CHARS:]


class Launcher:
    """Starts the processes of one command.

    Args:
        agent: the configuration; its `command` is given.
    """

    def __init__(self, agent: AgentConfig) -> None:
        assert agent.command is not None
        self._agent = agent
        self._interpreter, self._argv = split_command(agent.command)
        self._runs = itertools.count()
        self._processes: dict[str, AgentProcess] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._zygote: _Zygote | None = None
        self._starting = asyncio.Lock()

    @property
    def alive(self) -> int:
        """Number of processes that have not ended."""
        return len(self._processes)

    async def launch(self, variables: Mapping[str, str]) -> AgentProcess:
        """Start a process.

        Args:
            variables: environment variables of the episode.

        Raises:
            AgentUnavailable: the interpreter cannot be executed, or cannot import `agent.preload`.
            OSError: there is no room for a process.
        """
        link = await self._link()
        process = AgentProcess(str(next(self._runs)), Path(tempfile.mkdtemp(prefix="anchorage-agent-")))
        self._processes[process.run] = process
        read, write = os.pipe()
        try:
            await self._listen(process, read)
            await link.send(
                {
                    "run": process.run,
                    "argv": self._argv,
                    "environment": {**self._fixed(process.folder), **variables},
                    "folder": str(process.folder),
                    "limits": self._limits(),
                },
                write,
            )
        except BaseException:
            self._ended(process.run, None)
            raise
        finally:
            os.close(write)
        return process

    def end(self, process: AgentProcess, grace_s: float = 0.0) -> None:
        """End a process in the background: wait `grace_s` for it to exit, SIGTERM, `GRACE_S`, SIGKILL. Idempotent."""
        if not process.exited.done():
            task = asyncio.create_task(self._end(process, grace_s))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """End all processes and wait until they are gone, at most `GRACE_S` and a little more."""
        for process in [*self._processes.values()]:
            self.end(process)
        if self._ending:
            await asyncio.wait([*self._ending], timeout=GRACE_S + 2)
        if self._zygote is not None:
            await self._zygote.close()

    async def _end(self, process: AgentProcess, grace_s: float) -> None:
        for wait_s, number in ((grace_s, signal.SIGTERM), (GRACE_S, signal.SIGKILL)):
            if wait_s and not process.exited.done():
                await asyncio.wait([process.exited], timeout=wait_s)
            if process.exited.done():
                return
            zygote_link = self._zygote
            if zygote_link is None:
                return
            with contextlib.suppress(OSError):
                await zygote_link.send({"signal": int(number), "run": process.run})
        await asyncio.wait([process.exited], timeout=GRACE_S)

    async def _link(self) -> _Zygote:
        async with self._starting:
            if self._zygote is None or self._zygote.lost:
                zygote_link = _Zygote(self._heard, self._lost)
                await zygote_link.start(self._interpreter, self._agent.preload, self._fixed(Path("/")))
                self._zygote = zygote_link
            return self._zygote

    def _heard(self, message: Mapping[str, Any]) -> None:
        if "started" in message:
            process = self._processes.get(message["started"])
            if process is not None:
                process.pid = message["pid"]
        elif "exited" in message and (process := self._processes.get(message["exited"])) is not None:
            task = asyncio.create_task(self._finish(process, message["code"]))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _finish(self, process: AgentProcess, code: int) -> None:
        """Read the rest of the output of a process that has exited, before anybody is told."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OUTPUT_S):
                await process.silent.wait()
        self._ended(process.run, code)

    def _lost(self) -> None:
        """The zygote has ended, and the kernel has killed its children; what those started is killed here."""
        for process in [*self._processes.values()]:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            self._ended(process.run, None)

    def _ended(self, run: str, code: int | None) -> None:
        process = self._processes.pop(run, None)
        if process is None:
            return
        if not process.exited.done():
            process.exited.set_result(code)
        asyncio.get_running_loop().run_in_executor(None, lambda: shutil.rmtree(process.folder, ignore_errors=True))

    async def _listen(self, process: AgentProcess, descriptor: int) -> None:
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: _Output(process), os.fdopen(descriptor, "rb", 0))

    def _fixed(self, folder: Path) -> dict[str, str]:
        """The variables that every agent gets."""
        passed = {name: os.environ[name] for name in self._agent.pass_environment if name in os.environ}
        return {
            "PATH": f"{Path(self._interpreter).parent}:{SEARCH_PATH}",
            "LANG": "C.UTF-8",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            **passed,
        }

    def _limits(self) -> dict[str, int]:
        limits = {"RLIMIT_NOFILE": MOST_FILES, "RLIMIT_CORE": 0}
        if self._agent.memory_mib is not None:
            limits["RLIMIT_DATA"] = self._agent.memory_mib * 2**20
        return limits


class _Output(asyncio.Protocol):
    """Hands an agent's output to its `AgentProcess`."""

    def __init__(self, process: AgentProcess) -> None:
        self._process = process

    def data_received(self, data: bytes) -> None:
        self._process.wrote(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._process.silent.set()


class _Zygote:
    """The process that forks agents, and the link to it.

    Args:
        heard: gets each message.
        on_lost: called once when the process has ended.
    """

    def __init__(self, heard: Any, on_lost: Any) -> None:
        self._heard = heard
        self._on_lost = on_lost
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._listening: asyncio.Task[None] | None = None
        self._sending = asyncio.Lock()
        self.lost = False

    async def start(self, interpreter: str, preload: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it and wait until it has imported its modules. Raises AgentUnavailable."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(  # noqa: ASYNC220 - it returns once the process has been started
                    [interpreter, "-I", zygote.__file__, str(theirs.fileno()), str(os.getpid()), *preload],
                    env=dict(environment),
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise AgentUnavailable(f"cannot execute {interpreter}: {error.strerror}") from error
        ours.setblocking(False)
        self._socket = ours
        try:
            async with asyncio.timeout(READY_S):
                message = await self._receive()
        except TimeoutError:
            message = {"ready": f"it did not import {', '.join(preload)} within {READY_S:g} s"}
        except BaseException:
            self._process.kill()
            raise
        if message is None or message["ready"] is not None:
            reason = "it ended at once" if message is None else message["ready"]
            await self.close()
            raise AgentUnavailable(f"the interpreter of the agent ({interpreter}) is not usable: {reason}")
        self._listening = asyncio.create_task(self._listen())

    async def send(self, message: Mapping[str, object], descriptor: int | None = None) -> None:
        """Send a message, with a descriptor for the agent's output. Raises OSError."""
        assert self._socket is not None
        packet = json.dumps(message).encode()
        descriptors = [] if descriptor is None else [descriptor]
        async with self._sending:
            while True:
                try:
                    socket.send_fds(self._socket, [packet], descriptors)
                    return
                except BlockingIOError:  # the zygote is busy forking
                    await asyncio.sleep(0.01)

    async def _receive(self) -> dict[str, Any] | None:
        assert self._socket is not None
        try:
            packet = await asyncio.get_running_loop().sock_recv(self._socket, zygote.PACKET_BYTES)
        except ConnectionError:
            return None
        return json.loads(packet) if packet else None

    async def _listen(self) -> None:
        while (message := await self._receive()) is not None:
            self._heard(message)
        self.lost = True
        await asyncio.to_thread(self._wait)
        self._on_lost()

    def _wait(self) -> None:
        assert self._process is not None
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    async def close(self) -> None:
        """End the process; the agents that are left end with it."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._listening is not None:
            await self._listening
        elif self._process is not None:
            await asyncio.to_thread(self._wait)
        if self._socket is not None:
            self._socket.close()


def split_command(command: Sequence[str]) -> tuple[str, list[str]]:
    """The interpreter that forks the agents, and what each agent runs.

    Example, in a run whose interpreter is `/venv/bin/python`:
        [python, agent.py, --fast]        /venv/bin/python, [-python, agent.py, --fast]
        [/own/bin/python3, -m, agents]    /own/bin/python3, [-python, -m, agents]
        [node, agent.js]                  /venv/bin/python, [node, agent.js]
    """
    program, *arguments = command
    runs_python = bool(arguments) and (arguments[0] == "-m" or not arguments[0].startswith("-"))
    if not _PYTHON.fullmatch(Path(program).name) or not runs_python:
        return sys.executable, [*command]
    interpreter = sys.executable if program in ("python", "python3") else program
    return interpreter, [zygote.PYTHON, *arguments]


def command_problem(command: Sequence[str]) -> str | None:
    """Why a command cannot be run on this machine, in one line; None if nothing is wrong with it."""
    interpreter, argv = split_command(command)
    if argv[0] != zygote.PYTHON:
        if shutil.which(argv[0], path=SEARCH_PATH if "/" not in argv[0] else None) is None:
            return f"agent.command: no such program: {argv[0]}; give its absolute path"
        return None
    if not os.access(interpreter, os.X_OK):
        return f"agent.command: no such interpreter: {interpreter}"
    if argv[1] != "-m" and not Path(argv[1]).is_file():
        return f"agent.command: no such file: {argv[1]}; give a path that is relative to the recipe, or absolute"
    if argv[1] == "-m" and len(argv) < 3:
        return "agent.command: -m needs the name of a module"
    return None
