"""The HTTP application: routes, problem documents, token, limits, OpenAPI, and whatever a fuzzer sends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from env_servers.environment import Environment
from env_servers.server.app import create_app
from env_servers.server.settings import ServerSettings
from env_servers.sessions.table import SessionTable
from tests.env_servers.counting import Counting, Gated, Unspeakable

PROBLEM = "application/problem+json"
TASK = {"split": "train", "index": 3}


@asynccontextmanager
async def serving(environment: type[Environment] = Counting, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(environment, ServerSettings(**{"token": None, **options}))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            yield client


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(max_sessions=8, max_body_bytes=4096) as client:
        yield client


def assert_problem(response: httpx.Response, status: int, text: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    document = response.json()
    assert document["status"] == status
    assert document["title"]
    assert text in document["detail"]
    assert "\n" not in document["detail"]


async def opened(client: httpx.AsyncClient, **more: Any) -> str:
    response = await client.post("/reset", json={**TASK, **more})
    assert response.status_code == 200, response.text
    return str(response.json()["session"])


async def test_play_over_http(client: httpx.AsyncClient) -> None:
    session = await opened(client, max_steps=2)
    body = {"session": session, "step": 1, "action": "up"}
    first = await client.post("/step", json=body)
    assert first.json()["observation"] == "The count is 1, the target is 5."
    assert (await client.post("/step", json=body)).content == first.content
    last = (await client.post("/step", json={**body, "step": 2})).json()
    assert (last["terminated"], last["truncated"]) == (False, True)
    assert (await client.post("/close", json={"session": session})).status_code == 204


async def test_info_health_and_metrics(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).json() == {"status": "healthy"}
    info = (await client.get("/info")).json()
    assert (info["name"], info["splits"], info["max_sessions"]) == ("counting", {"train": 50, "broken": 1}, 8)
    assert (info["engine"], info["source"]) == ("", "generated")
    session = await opened(client)
    await client.post("/step", json={"session": session, "step": 1, "action": "up"})
    await client.get("/nowhere")
    metrics = (await client.get("/metrics")).text
    assert "anchorage_env_sessions 1.0" in metrics
    assert "anchorage_env_steps_total 1.0" in metrics
    assert 'anchorage_env_errors_total{status="404"} 1.0' in metrics
    assert 'anchorage_env_request_seconds_count{route="/step"} 1.0' in metrics
    assert "nowhere" not in metrics


async def test_problems_of_sessions(client: httpx.AsyncClient) -> None:
    session = await opened(client)
    step = {"session": session, "step": 7, "action": "up"}
    assert_problem(await client.post("/step", json=step), 409, "next step is 1")
    assert_problem(await client.post("/step", json={**step, "session": "x"}), 404, "no such session")
    await client.post("/close", json={"session": session})
    assert_problem(await client.post("/step", json=step), 410, "closed")
    assert_problem(await client.post("/close", json={"session": "x"}), 404, "no such session")


async def test_problems_of_tasks(client: httpx.AsyncClient) -> None:
    assert_problem(await client.post("/reset", json={"split": "no", "index": 0}), 404, "no task")
    assert_problem(await client.post("/reset", json={"split": "broken", "index": 0}), 422, "damaged")


async def test_problems_of_requests(client: httpx.AsyncClient) -> None:
    assert_problem(await client.get("/nowhere"), 404, "Not Found")
    assert_problem(await client.get("/step"), 405, "Method Not Allowed")
    assert_problem(await client.post("/reset", json={**TASK, "index": -1}), 422, "index: ")
    assert_problem(await client.post("/reset", json={**TASK, "extra": 1}), 422, "extra: ")
    for field, value in (("index", True), ("index", "3"), ("max_steps", "5"), ("expert", 1)):
        assert_problem(await client.post("/reset", json={**TASK, field: value}), 422, f"{field}: ")
    assert_problem(
        await client.post("/reset", content=b"{", headers={"content-type": "application/json"}), 422, "Invalid JSON"
    )
    assert_problem(await client.post("/reset", content=orjson.dumps(TASK)), 415, "application/json")


async def test_a_long_body_is_refused_whether_it_is_announced_or_not(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b" " * 1000

    assert_problem(await client.post("/step", content=b" " * 5000, headers=headers), 413, "4096 bytes")
    assert_problem(await client.post("/step", content=chunks(), headers=headers), 413, "4096 bytes")


async def test_a_body_that_never_ends_is_given_up(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("env_servers.server.middleware.BODY_LIMIT_S", 0.05)

    async def trickle() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    headers = {"content-type": "application/json"}
    assert_problem(await client.post("/step", content=trickle(), headers=headers), 408, "did not arrive")


async def test_requests_at_the_same_time_are_bounded() -> None:
    Gated.gate.clear()
    Gated.entered.clear()
    async with serving(Gated, max_requests=1) as client:
        session = await opened(client)
        body = {"session": session, "step": 1, "action": "up"}
        step = asyncio.create_task(client.post("/step", json=body))
        assert await asyncio.to_thread(Gated.entered.wait, 30)
        refused = await client.get("/info")
        assert_problem(refused, 503, "the limit of 1 concurrent requests is reached")
        assert refused.headers["retry-after"] == "1"
        assert (await client.get("/health")).status_code == 200
        Gated.gate.set()
        assert (await step).status_code == 200


async def test_long_answers_to_batches_are_compressed_on_request(client: httpx.AsyncClient) -> None:
    async with serving(max_sessions=400) as roomy:
        many = {"items": [TASK] * 300}
        packed = await roomy.post("/batch/reset", json=many, headers={"accept-encoding": "gzip"})
        assert (packed.headers["content-encoding"], len(packed.json()["items"])) == ("gzip", 300)
    plain = await client.post("/batch/reset", json={"items": [TASK]}, headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in plain.headers


async def test_a_full_server_says_when_to_try_again(client: httpx.AsyncClient) -> None:
    for _ in range(8):
        await opened(client)
    response = await client.post("/reset", json=TASK)
    assert_problem(response, 503, "all 8 sessions")
    assert int(response.headers["retry-after"]) >= 1


async def test_a_failing_environment_is_a_500_without_its_secrets(client: httpx.AsyncClient) -> None:
    session = await opened(client)
    response = await client.post("/step", json={"session": session, "step": 1, "action": "fail"})
    assert_problem(response, 500, "the environment failed at step 1")
    assert "secret" not in response.text


async def test_an_unexpected_error_is_a_500_without_a_traceback(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def boom(*_: object) -> None:
        raise RuntimeError("secret inner state")

    monkeypatch.setattr("env_servers.sessions.table.SessionTable.close", boom)
    response = await client.post("/close", json={"session": "x"})
    assert_problem(response, 500, "unexpected error")
    assert "secret" not in response.text


async def test_batches_settle_each_item_on_its_own(client: httpx.AsyncClient) -> None:
    resets = [TASK, {"split": "no", "index": 0}, TASK]
    first, unknown, second = (await client.post("/batch/reset", json={"items": resets})).json()["items"]
    assert unknown["status"] == 404
    steps = [
        {"session": first["session"], "step": 1, "action": "up"},
        {"session": second["session"], "step": 5, "action": "up"},
        {"session": "x", "step": 1, "action": "up"},
    ]
    items = (await client.post("/batch/step", json={"items": steps})).json()["items"]
    assert items[0]["observation"].startswith("The count is 1")
    assert [item["status"] for item in items[1:]] == [409, 404]


async def test_a_batch_outlives_an_answer_that_json_cannot_hold() -> None:
    async with serving(Unspeakable) as client:
        sessions = [await opened(client) for _ in range(3)]
        steps = [
            {"session": session, "step": 1, "action": action}
            for session, action in zip(sessions, ("down", "up", "down"), strict=True)
        ]
        response = await client.post("/batch/step", json={"items": steps})
        assert response.status_code == 200
        first, broken, third = response.json()["items"]
        assert (first["step"], third["step"]) == (1, 1)
        assert (broken["status"], "the environment failed at step 1" in broken["detail"]) == (500, True)
        assert_problem(await client.post("/step", json={**steps[1], "step": 2}), 410, "failed")
        assert_problem(await client.post("/step", json={**steps[0], "step": 2, "action": "mumble"}), 500, "at step 2")


@pytest.mark.parametrize("path", ["/step", "/mcp"])
async def test_a_client_that_leaves_before_its_request_is_whole_is_no_error(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Counting, ServerSettings(token=None))
    said: list[Any] = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    answered = []

    async def receive() -> Any:
        return said.pop(0)

    async def send(message: Any) -> None:
        answered.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    await app(scope, receive, send)
    assert (answered, caplog.records) == ([], [])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
        assert "anchorage_env_errors_total{" not in (await client.get("/metrics")).text


@pytest.mark.parametrize("sent", [None, "Bearer wrong", "Basic right", "Bearer", "right"])
async def test_the_token_guards_everything_but_health(sent: str | None) -> None:
    async with serving(token=SecretStr("right")) as client:
        headers = {} if sent is None else {"authorization": sent}
        for method, path in [
            ("GET", "/info"),
            ("POST", "/step"),
            ("GET", "/metrics"),
            ("GET", "/openapi.json"),
            ("GET", "/x"),
        ]:
            response = await client.request(method, path, headers=headers)
            assert_problem(response, 401, "bearer token")
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/health")).status_code == 200


async def test_the_right_token_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANCHORAGE_ENV_TOKEN", "right")
    settings = ServerSettings()
    assert "right" not in repr(settings)
    async with serving(token=settings.token) as client:
        assert (await client.get("/info", headers={"authorization": "Bearer right"})).status_code == 200


async def test_idle_sessions_go_away_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    swept = asyncio.Event()
    real_expire = SessionTable.expire

    def expire(table: SessionTable) -> int:
        closed = real_expire(table)
        if closed:
            swept.set()
        return closed

    monkeypatch.setattr(SessionTable, "expire", expire)
    async with serving(idle_seconds=0.02) as client:
        session = await opened(client)
        await asyncio.wait_for(swept.wait(), 30)
        assert "anchorage_env_sessions 0.0" in (await client.get("/metrics")).text
        step = {"session": session, "step": 1, "action": "up"}
        assert_problem(await client.post("/step", json=step), 410, "expired")


async def test_openapi_names_every_body_answer_and_problem() -> None:
    async with serving(token=SecretStr("t")) as client:
        document = (await client.get("/openapi.json", headers={"authorization": "Bearer t"})).json()
    step = document["paths"]["/step"]["post"]
    schema = {"$ref": "#/components/schemas/StepRequest"}
    assert step["requestBody"]["content"]["application/json"]["schema"] == schema
    assert step["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/StepResult")
    assert step["security"] == [{"HTTPBearer": []}]
    assert "security" not in document["paths"]["/health"]["get"]
    assert set(step["responses"]) == {"200", "401", "404", "408", "409", "410", "413", "415", "422", "500", "503"}
    for methods in document["paths"].values():
        for operation in methods.values():
            problems = {status: r for status, r in operation["responses"].items() if status >= "400"}
            for answer in problems.values():
                assert answer["content"][PROBLEM]["schema"] == {"$ref": "#/components/schemas/Problem"}
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert set(document["paths"]["/close"]["post"]["responses"]) >= {"204", "404"}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(["split", "index", "session", "step", "action", "anchor", "max_steps", "expert", "items"])
VALUES = JSON_VALUES | st.sampled_from(["train", "broken", "up", "state", 10**40, "\x00", "\ud800", "é" * 300])
BODIES = st.binary(max_size=200) | st.dictionaries(FIELDS, VALUES, max_size=6)
PATHS = st.sampled_from(["/reset", "/step", "/close", "/batch/reset", "/batch/step"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=PATHS, body=BODIES, in_items=st.booleans(), valid_base=st.booleans())
def test_no_body_whatever_is_the_servers_fault(path: str, body: Any, in_items: bool, valid_base: bool) -> None:
    if isinstance(body, dict):
        item = {**TASK, **body} if valid_base and "reset" in path else body
        content = json.dumps({"items": [item]} if in_items else item).encode()
    else:
        content = body

    async def send() -> httpx.Response:
        async with serving() as client:
            return await client.post(path, content=content, headers={"content-type": "application/json"})

    response = asyncio.run(send())
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert response.headers["content-type"] == PROBLEM
