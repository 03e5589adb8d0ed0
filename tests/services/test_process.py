from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from services import process
from services.process import ReservedPort
from tests.waiting import until

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
]
PARENT = """
import sys, time
from services import process
print(process.start([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep(600)
"""


def started(command: list[str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        child = process.start(command, output=file)
    until(lambda: "up" in output.read_text())
    return child


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_child_dies_with_a_killed_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
        parent.kill()
    until(lambda: is_gone(pid), 30)


def test_a_child_dies_with_the_thread_that_started_it() -> None:
    children: list[subprocess.Popen[bytes]] = []
    thread = threading.Thread(target=lambda: children.append(process.start(SLEEPER)))
    thread.start()
    thread.join()
    assert until(children[0].poll, 30) == -signal.SIGKILL


def test_a_child_has_its_environment_its_folder_and_its_descriptors(tmp_path: Path) -> None:
    inherited = os.open(tmp_path / "inherited", os.O_RDWR | os.O_CREAT)
    script = f"import os; os.write({inherited}, (os.environ['GREETING'] + os.getcwd() + os.environ['HOME']).encode())"
    child = process.start(
        [sys.executable, "-c", script], environment={"GREETING": "hello "}, cwd=tmp_path, pass_fds=[inherited]
    )
    os.close(inherited)
    assert child.wait(30) == 0
    assert (tmp_path / "inherited").read_text() == f"hello {tmp_path}{os.environ['HOME']}"


def test_a_command_that_cannot_be_executed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        process.start(["no-such-program"])
    (tmp_path / "script").write_text("")
    with pytest.raises(PermissionError, match="script"):
        process.start([str(tmp_path / "script")])


def test_stop_terminates_and_is_idempotent(tmp_path: Path) -> None:
    child = started(SLEEPER, tmp_path / "output")
    assert process.stop(child, 30) == -signal.SIGTERM
    assert process.stop(child, 30) == -signal.SIGTERM


def test_stop_kills_what_does_not_end(tmp_path: Path) -> None:
    child = started(STUBBORN, tmp_path / "output")
    assert process.stop(child, 0.2) == -signal.SIGKILL


def test_a_reserved_port_is_refused_to_others_and_given_to_its_server() -> None:
    with ReservedPort("127.0.0.1") as port, socket.socket() as other, socket.socket() as server:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port.number))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port.number))
        server.listen()
        with socket.create_connection(("127.0.0.1", port.number), timeout=5):
            pass


def test_reserved_ports_differ() -> None:
    ports = [ReservedPort() for _ in range(200)]
    assert len({port.number for port in ports}) == 200
    for port in ports:
        port.close()
        port.close()
