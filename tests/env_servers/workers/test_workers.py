"""Several processes behind one port: one server to its clients, and each process loses its own sessions only."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import pytest

from env_servers.client import HttpClient, RequestRejected, SessionLost
from env_servers.launch import ServerProcess, start_server
from env_servers.protocol import Problem, ResetRequest, StepRequest, StepResult
from env_servers.sessions.ids import worker_of_session
from tests.waiting import until

COUNTING = "tests.env_servers.counting:Counting"
TASK = ResetRequest(split="train", index=3)


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "env_servers", COUNTING, "--port", "0", *options]


def start(folder: Path, *options: str) -> ServerProcess:
    ready = folder / "ready"
    return start_server(command("--workers", "3", "--ready-file", str(ready), *options), ready)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with start(tmp_path_factory.mktemp("workers"), "--max-sessions", "301", "--max-body-bytes", "65536") as server:
        yield server


@pytest.fixture
def server(shared_server: ServerProcess) -> Iterator[ServerProcess]:
    """The server that the file shares; a test leaves no session behind."""
    yield shared_server
    until(lambda: "anchorage_env_sessions 0.0" in httpx.get(f"{shared_server.url}/metrics", timeout=30).text)


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[HttpClient]:
    client = HttpClient(server.url)
    yield client
    await client.close()


def worker_of(result: StepResult | Problem) -> int | None:
    assert isinstance(result, StepResult), result
    return worker_of_session(result.session)


async def test_sessions_are_spread_and_stay_where_they_are(client: HttpClient) -> None:
    opened = await asyncio.gather(*(client.reset(TASK) for _ in range(60)))
    spread = Counter(map(worker_of, opened))
    assert len(spread) == 3
    assert min(spread.values()) >= 10

    async def play(session: str) -> StepResult:
        for step in range(1, 5):
            await client.step(session, step, "up")
        return await client.step(session, 5, "up")

    ends = await asyncio.gather(*(play(first.session) for first in opened))
    assert [(end.session, end.step, end.terminated) for end in ends] == [(o.session, 5, True) for o in opened]
    await asyncio.gather(*(client.close_session(first.session) for first in opened))
    with pytest.raises(SessionLost, match="closed"):
        await client.step(opened[0].session, 6, "up")


async def test_every_connection_reaches_every_session(server: ServerProcess, client: HttpClient) -> None:
    session = (await client.reset(TASK)).session
    answers = []
    for _ in range(12):
        async with httpx.AsyncClient() as fresh:
            body = {"session": session, "step": 1, "action": "up"}
            answers.append((await fresh.post(f"{server.url}/step", json=body)).json())
    assert all(answer == answers[0] for answer in answers)
    assert (await client.step(session, 2, "up")).observation.startswith("The count is 2,")
    await client.close_session(session)


async def test_batches_are_put_together_in_order(client: HttpClient) -> None:
    resets = [ResetRequest(split="train", index=index) for index in range(10)]
    opened = await client.reset_many([*resets, ResetRequest(split="no", index=0)])
    assert [r.observation for r in opened[:10] if isinstance(r, StepResult)] == [
        f"The count is 0, the target is {index + 2}." for index in range(10)
    ]
    assert isinstance(opened[10], Problem)
    assert len(set(map(worker_of, opened[:10]))) == 3
    sessions = [first.session for first in opened if isinstance(first, StepResult)]
    steps = [StepRequest(session=session, step=1, action="up") for session in reversed(sessions)]
    stepped = await client.step_many([*steps, StepRequest(session="x", step=1, action="up")])
    assert [r.session for r in stepped[:10] if isinstance(r, StepResult)] == sessions[::-1]
    assert isinstance(stepped[10], Problem)
    assert stepped[10].status == 404
    for session in sessions:
        await client.close_session(session)


async def test_errors_are_those_of_one_process(server: ServerProcess, client: HttpClient) -> None:
    session = (await client.reset(TASK)).session
    with pytest.raises(RequestRejected, match="next step is 1"):
        await client.step(session, 2, "up")
    async with httpx.AsyncClient(base_url=server.url) as http:
        for path, content, kind, status in (
            ("/step", b"{", "application/json", 422),
            ("/step", b"[]", "application/json", 422),
            ("/step", b'{"session": 1, "step": 1, "action": "up"}', "application/json", 422),
            ("/step", b"{}", "text/plain", 415),
            ("/batch/step", b'{"items": [{}]}', "application/json", 422),
            ("/batch/reset", b'{"items": []}', "application/json", 422),
            ("/step", b" " * 70000, "application/json", 413),
            ("/reset", b'{"split": "no", "index": 0}', "application/json", 404),
            ("/agentgym/step", b'{"id": 99, "action": "up"}', "application/json", 404),
        ):
            response = await http.post(path, content=content, headers={"content-type": kind})
            assert (response.status_code, path) == (status, path), response.text
            assert response.headers["content-type"] == "application/problem+json"
        for query in ("", "?id=", "?id=x", "?id=99", f"?id={10**30}"):
            assert (await http.get(f"/agentgym/observation{query}")).status_code in (404, 422)
    await client.close_session(session)


async def test_agentgym_is_spread_too(server: ServerProcess) -> None:
    async with httpx.AsyncClient(base_url=f"{server.url}/agentgym") as http:
        numbers = [(await http.post("/create")).json()["id"] for _ in range(6)]
        assert len({number >> 43 for number in numbers}) == 3
        for number in numbers:
            await http.post("/reset", json={"id": number, "game": 0})
            await http.post("/step", json={"id": number, "action": "up"})
        for number in numbers:
            seen = await http.get("/observation", params={"id": number})
            assert seen.json() == "The count is 1, the target is 2."
            assert (await http.post("/close", json={"id": number})).status_code == 200


async def test_the_whole_limit_is_used_and_then_refused(server: ServerProcess) -> None:
    client = HttpClient(server.url, patience_s=0.0)
    assert (await client.info()).max_sessions == 301
    opened = await asyncio.gather(*(client.reset(TASK) for _ in range(301)))
    async with httpx.AsyncClient() as http:
        refused = await http.post(f"{server.url}/reset", json=TASK.model_dump())
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    await asyncio.gather(*(client.close_session(first.session) for first in opened))
    await client.close()


async def test_a_batch_of_resets_finds_every_free_place(tmp_path: Path) -> None:
    with start(tmp_path, "--max-sessions", "4") as server:
        client = HttpClient(server.url)
        for _ in range(3):
            opened = await client.reset_many([TASK] * 6)
            sessions = [first.session for first in opened if isinstance(first, StepResult)]
            refused = [answer for answer in opened if isinstance(answer, Problem)]
            assert (len(sessions), [answer.status for answer in refused]) == (4, [503, 503])
            for session in sessions:
                await client.close_session(session)
        (victim, *_) = psutil.Process(server.pid).children()
        victim.kill()
        assert not [answer for answer in await client.reset_many([TASK] * 2) if isinstance(answer, Problem)]
        await client.close()


async def test_the_document_names_what_only_several_processes_answer(server: ServerProcess) -> None:
    async with httpx.AsyncClient(base_url=server.url) as http:
        paths = (await http.get("/openapi.json")).json()["paths"]
    assert {"410", "504"} <= set(paths["/close"]["post"]["responses"])
    for path, answers in (("/reset", "post"), ("/step", "post"), ("/agentgym/observation", "get")):
        assert "504" in paths[path][answers]["responses"]
    assert "504" not in paths["/info"]["get"]["responses"]


async def test_metrics_are_added_up(server: ServerProcess, client: HttpClient) -> None:
    def count(page: str, name: str) -> float:
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name} "))

    opened = await asyncio.gather(*(client.reset(TASK) for _ in range(9)))
    async with httpx.AsyncClient(base_url=server.url) as http:
        page = (await http.get("/metrics")).text
        resets = count(page, "anchorage_env_resets_total")
        assert count(page, "anchorage_env_sessions") == 9
        assert page.count("# TYPE anchorage_env_sessions gauge") == 1
        assert 'anchorage_env_request_seconds_bucket{le="0.001",route="/step"}' in page
        for first in opened:
            await client.close_session(first.session)
        last = await client.reset(TASK)
        page = (await http.get("/metrics")).text
        assert (count(page, "anchorage_env_sessions"), count(page, "anchorage_env_resets_total")) == (1, resets + 1)
        await client.close_session(last.session)


async def test_openenv_sessions_live_on_their_sockets(server: ServerProcess) -> None:
    async with aiohttp.ClientSession() as http:

        async def play(number: int) -> str:
            async with http.ws_connect(f"{server.url}/ws") as socket:
                await socket.send_json({"type": "reset", "data": {"index": 9, "max_steps": 5}})
                await socket.receive_json(timeout=30)
                for _ in range(number):
                    await socket.send_json({"type": "step", "data": {"action": "up"}})
                    answer = await socket.receive_json(timeout=30)
                return str(answer["data"]["observation"]["text"])

        texts = await asyncio.gather(*(play(1 + number % 5) for number in range(30)))
    assert texts == [f"The count is {1 + number % 5}, the target is 11." for number in range(30)]


async def test_sockets_fill_the_whole_server_whichever_process_they_reach(tmp_path: Path) -> None:
    """As many as the server takes sessions; more of them than its share reach some process."""
    with start(tmp_path, "--max-sessions", "30") as server:
        async with aiohttp.ClientSession() as http, AsyncExitStack() as opened:

            async def ask(socket: aiohttp.ClientWebSocketResponse, kind: str, **data: object) -> dict[str, Any]:
                await socket.send_json({"type": kind, "data": data})
                answer: dict[str, Any] = await socket.receive_json(timeout=30)
                return answer

            async def connect() -> aiohttp.ClientWebSocketResponse:
                return await opened.enter_async_context(http.ws_connect(f"{server.url}/ws"))

            sockets = [await connect() for _ in range(30)]
            for number, socket in enumerate(sockets):
                assert (await ask(socket, "reset", index=number))["type"] == "observation"
            refused = (await ask(await connect(), "reset", index=0))["data"]
            assert (refused["code"], refused["max_sessions"]) == ("CAPACITY_REACHED", 30)
            for number, socket in enumerate(sockets):
                seen = (await ask(socket, "step", action="up"))["data"]["observation"]
                assert seen["text"] == f"The count is 1, the target is {number + 2}."
                failed = await ask(socket, "step", action="fail")
                assert (failed["type"], "failed at step 2" in failed["data"]["message"]) == ("error", True)
                assert (await ask(socket, "step", action="up"))["data"]["code"] == "SESSION_ERROR"
                wrong = (await ask(socket, "reset", split="no"))["data"]
                assert (wrong["code"], "no task no/" in wrong["message"]) == ("EXECUTION_ERROR", True)
                assert (await ask(socket, "reset", index=number))["type"] == "observation"
            for socket in sockets:
                await socket.close()
            async with asyncio.timeout(30):
                url = f"{server.url}/metrics"
                while "anchorage_env_sessions 0.0" not in await (await http.get(url)).text():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)


async def test_a_killed_process_loses_its_own_sessions_only(tmp_path: Path) -> None:
    with start(tmp_path) as server:
        client = HttpClient(server.url)
        opened = await asyncio.gather(*(client.reset(TASK) for _ in range(30)))
        victim = psutil.Process(server.pid).children()[0]
        victim.kill()
        lost = []
        for first in opened:
            try:
                assert (await client.step(first.session, 1, "up")).step == 1
            except SessionLost as error:
                lost.append((worker_of(first), str(error)))
        ((worker, reason),) = set(lost)
        assert len(lost) == sum(worker_of(first) == worker for first in opened)
        assert "the worker process that held the session has ended" in reason
        async with httpx.AsyncClient() as http:
            gone = next(first for first in opened if worker_of(first) == worker)
            body = {"session": gone.session, "step": 1, "action": "up"}
            assert (await http.post(f"{server.url}/step", json=body)).status_code == 410
        async with asyncio.timeout(30):
            while 4 not in {worker_of(await client.reset(TASK)) for _ in range(6)}:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
        await client.close()


def test_processes_that_never_stay_up_end_the_server(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = subprocess.Popen(command("--workers", "2", "--ready-file", str(ready)), stderr=subprocess.PIPE, text=True)

    def ended() -> bool:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children():
                child.kill()
        return process.poll() is not None

    until(ended)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "the worker processes end as soon as they have started" in stderr or "did not start" in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    ready = tmp_path / "ready"
    process = subprocess.Popen(command("--workers", "2", "--ready-file", str(ready)), stderr=subprocess.PIPE, text=True)
    until(ready.exists)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=30)
    until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
    assert "Traceback" not in stderr
    assert list(tmp_path.glob("anchorage-env-*")) == [] or number == signal.SIGKILL
    if number != signal.SIGKILL:
        assert (process.returncode, ready.exists()) == (0, False)


def test_a_taken_port_is_refused(server: ServerProcess) -> None:
    port = server.url.rpartition(":")[2]
    again = [sys.executable, "-m", "env_servers", COUNTING, "--workers", "2", "--port", port]
    done = subprocess.run(again, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        f"anchorage: port {port} on 127.0.0.1 is in use: choose another with --port\n",
    )
