"""Server processes: their socket, token, ready file and signals, and that they die with their parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from env_servers.__main__ import main
from env_servers.errors import ServerError
from env_servers.launch import start_server
from env_servers.registry import load_environment
from tests.waiting import until

COUNTING = "tests.env_servers.counting:Counting"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "env_servers", *arguments]


def test_a_taken_port_is_one_line_and_exit_code_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = command(COUNTING, "--port", str(port))
        done = subprocess.run(refused, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == f"anchorage: port {port} on 127.0.0.1 is in use: choose another with --port\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((COUNTING, "--host", "0.0.0.0"), "listening on 0.0.0.0 requires a token: set ANCHORAGE_ENV_TOKEN"),
        ((COUNTING, "--host", "host.invalid"), "cannot resolve host host.invalid"),
        ((COUNTING, "--port", "70000"), "invalid option: port: "),
        ((COUNTING, "--token-env", "NO_SUCH_VARIABLE"), "variable NO_SUCH_VARIABLE is not set"),
        (("nothing",), "unknown environment 'nothing': use one of alfworld"),
        (("no_such_module:Thing",), "cannot load environment 'no_such_module:Thing': No module named 'no_such_module'"),
        (("tests.env_servers.counting:TASKS",), "not a class derived from Environment"),
        (("tests.env_servers.counting:Broken",), "cannot be served: the data folder is empty"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    arguments: Sequence[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANCHORAGE_ENV_TOKEN", raising=False)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


def test_a_token_opens_the_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "right")
    ready = tmp_path / "ready"
    served = command(
        COUNTING, "--host", "0.0.0.0", "--port", "0", "--token-env", "MY_TOKEN", "--ready-file", str(ready)
    )
    with start_server(served, ready) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{server.url}/info").status_code == 401
        assert httpx.get(f"{server.url}/info", headers={"authorization": "Bearer right"}).status_code == 200
        assert "right" not in server.log_file.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    ready = tmp_path / "ready"
    process = subprocess.Popen(
        command(COUNTING, "--port", "0", "--ready-file", str(ready)), stderr=subprocess.PIPE, text=True
    )
    until(ready.exists)
    url = ready.read_text().strip()
    assert httpx.get(f"{url}/health").json() == {"status": "healthy"}
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in stderr, ready.exists()) == (0, False, False)


def test_a_stopped_server_is_gone_and_can_be_stopped_again(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.write_text("http://stale")
    server = start_server(command(COUNTING, "--port", "0", "--ready-file", str(ready)), ready)
    assert server.alive
    assert server.url != "http://stale"
    server.stop()
    server.stop()
    assert not server.alive


def test_a_server_that_cannot_start_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"exit code 2.*unknown environment 'nothing'"):
        start_server(command("nothing"), tmp_path / "ready")
    with pytest.raises(ServerError, match="no-such-program: No such file"):
        start_server(["no-such-program"], tmp_path / "ready")


def test_a_server_that_never_listens_is_ended(tmp_path: Path) -> None:
    silent = ["sh", "-c", "echo pid $$; exec sleep 600"]
    with pytest.raises(ServerError, match=r"did not start within 1 s: pid \d+") as caught:
        start_server(silent, tmp_path / "ready", timeout_s=1.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(caught.value).rpartition(" ")[2]), 0)


PARENT = """
import sys, time
from pathlib import Path
from env_servers.launch import start_server
print(start_server(sys.argv[2:], Path(sys.argv[1])).url, flush=True)
time.sleep(600)
"""


def test_a_server_dies_with_its_parent(tmp_path: Path) -> None:
    ready = str(tmp_path / "ready")
    served = command(COUNTING, "--port", "0", "--ready-file", ready)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, ready, *served], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    url = parent.stdout.readline().strip()
    assert _answers(url)
    parent.kill()
    parent.communicate(timeout=30)
    until(lambda: not _answers(url))


def test_the_registry_imports_nothing_before_it_is_asked() -> None:
    code = "import sys, env_servers.registry; print([m for m in sys.modules if 'alfworld' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    assert load_environment(COUNTING).name == "counting"


def test_a_call_that_hangs_does_not_keep_a_server_from_ending(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    served = command("tests.env_servers.counting:Hanging", "--port", "0", "--ready-file", str(ready))
    process = subprocess.Popen([*served, "--call-seconds", "1"], stderr=subprocess.PIPE, text=True)
    until(ready.exists)
    with httpx.Client(base_url=ready.read_text().strip()) as client:
        session = client.post("/reset", json={"split": "train", "index": 0}).json()["session"]
        hung = client.post("/step", json={"session": session, "step": 1, "action": "hang"})
        assert (hung.status_code, "no answer within 1 s" in hung.json()["detail"]) == (500, True)
        assert "anchorage_env_hung_calls 1.0" in client.get("/metrics").text
    process.terminate()
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, "Traceback" in stderr) == (0, False)


SILENT = """
import env_servers.server.http_protocol, sys
env_servers.server.http_protocol.HEAD_LIMIT_S = 0.3
from env_servers.__main__ import main
sys.exit(main())
"""


def test_a_connection_that_says_nothing_is_closed_and_others_are_not(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    served = [sys.executable, "-c", SILENT, COUNTING, "--port", "0", "--ready-file", str(ready)]
    with start_server(served, ready) as server, httpx.Client(base_url=server.url) as talking:
        talking.get("/health").raise_for_status()
        host, port = server.url.removeprefix("http://").split(":")
        for beginning in (b"", b"GET /health HT"):
            with socket.create_connection((host, int(port)), timeout=30) as silent:
                silent.sendall(beginning)
                assert silent.recv(100) == b""
        assert talking.get("/health").json() == {"status": "healthy"}


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
