"""Requests to a server that fails in every way there is."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import pytest
from aiohttp import web

from anchorage.api_models import client
from anchorage.api_models.client import ApiModel, NoAnswer
from anchorage.api_models.settings import ApiOptions, endpoint
from anchorage.api_models.wire import SHOWN, Reply
from env_servers.errors import SHOWN_CHARS
from services.backoff import Backoff
from services.errors import AnchorageError, ModelUnavailable
from tests.anchorage.api_models.foreign_api import Asked, ForeignApi, Handler, fails, foreign_api, says

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF", Backoff(0.01, 0.05))


async def ask(url: str, times: int = 1, timeout_s: float = 60.0, **options: object) -> list[Reply | AnchorageError]:
    """What comes of so many requests, one after the other."""
    given = ApiOptions(url=url, timeout_s=timeout_s, **options)  # type: ignore[arg-type]
    where = endpoint(given, {"OPENAI_API_KEY": KEY})
    results: list[Reply | AnchorageError] = []
    async with ApiModel("gpt", where, given, most_tokens=12, thoughts=False) as model:
        for number in range(times):
            try:
                results.append(await model.ask(["hello"], temperature=0.4, seed=number))
            except AnchorageError as error:
                results.append(error)
    return results


def answered_by(*answers: Callable[[Asked], web.StreamResponse]) -> Handler:
    async def handler(asked: Asked) -> web.StreamResponse:
        return answers[min(asked.number, len(answers) - 1)](asked)

    return handler


async def test_the_request_is_the_apis() -> None:
    with foreign_api(answered_by(lambda asked: says("up"))) as api:
        assert await ask(f"{api.url}?version=1") == [Reply("up", True, "", 100, 7)]
    (asked,) = api.asked
    assert asked.path == "/v1/chat/completions?version=1"
    assert asked.headers["Authorization"] == f"Bearer {KEY}"
    assert asked.body == {
        "model": "gpt",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 12,
        "temperature": 0.4,
        "seed": 0,
    }


async def test_what_the_model_does_not_accept_is_left_out_from_then_on() -> None:
    async def handler(asked: Asked) -> web.StreamResponse:
        if "temperature" in asked.body:
            return fails(400, "Unsupported value: 'temperature'", param="temperature")
        if "max_tokens" in asked.body:
            return fails(400, "'max_tokens' is not supported. Use 'max_completion_tokens' instead.", param="max_tokens")
        if "seed" in asked.body:
            return fails(422, "extra fields not permitted: seed")
        return says("up")

    with foreign_api(handler) as api:
        options = ApiOptions(url=api.url)
        async with ApiModel("gpt", endpoint(options, {}), options, most_tokens=12, thoughts=False) as model:
            for seed in range(2):
                assert (await model.ask(["hello"], temperature=0.4, seed=seed)).text == "up"
        assert model.not_accepted == ["temperature", "seed"]
    assert len(api.asked) == 5
    assert api.asked[-1].body == {
        "model": "gpt",
        "messages": [{"role": "user", "content": "hello"}],
        "max_completion_tokens": 12,
    }
    assert "Authorization" not in api.asked[-1].headers


@pytest.mark.parametrize(
    "answer",
    [
        lambda asked: fails(429, "slow down", {"Retry-After": "0.05"}),
        lambda asked: fails(408, "slow"),
        lambda asked: fails(503, "loading"),
        lambda asked: web.Response(status=502, text="<html>Bad gateway</html>", content_type="text/html"),
        lambda asked: web.Response(text="<html>Welcome</html>", content_type="text/html"),
        lambda asked: web.Response(text="data: {}\n\n", content_type="text/event-stream"),
        lambda asked: web.Response(body=b"\xff\x00"),
        lambda asked: web.json_response({"error": {"message": "upstream", "code": 502}}),
        lambda asked: web.json_response({"error": {"message": "upstream", "code": "oops"}}),
        lambda asked: web.Response(text="{}", headers={"Content-Length": "2"}),
    ],
)
async def test_what_may_pass_is_retried(answer: Callable[[Asked], web.StreamResponse]) -> None:
    with foreign_api(answered_by(answer, answer, lambda asked: says("up"))) as api:
        assert [getattr(reply, "text", reply) for reply in await ask(api.url)] == ["up"]
    assert len(api.asked) == 3


async def test_retry_after_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    sleep = asyncio.sleep

    async def recorded(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(client.asyncio, "sleep", recorded)
    slow = answered_by(lambda asked: fails(429, "slow down", {"Retry-After": "3"}), lambda asked: says("up"))
    with foreign_api(slow) as api:
        assert isinstance((await ask(api.url))[0], Reply)
    assert [wait for wait in waits if wait] == [3.0]
    with foreign_api(answered_by(lambda asked: fails(429, "slow down", {"Retry-After": "3600"}))) as api:
        (error,) = await ask(api.url)
    assert "status 429: slow down" in str(error)
    assert len(api.asked) == 1


async def hangs(asked: Asked) -> web.StreamResponse:
    await asked.hold.wait()
    return says("late")


async def test_a_server_that_hangs_is_given_up_within_the_timeouts() -> None:
    with foreign_api(hangs) as api:
        (error,) = await ask(api.url, timeout_s=0.2)
    assert isinstance(error, ModelUnavailable)
    assert "no answer within 0.2 s" in str(error)
    assert 1 < len(api.asked) <= 4


async def test_after_three_failures_a_request_gets_one_attempt_until_one_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.005)

    async def handler(asked: Asked) -> web.StreamResponse:
        return says("up") if asked.number == 0 or asked.body["seed"] >= 5 else fails(500, "broken")

    with foreign_api(handler) as api:
        results = await ask(api.url, times=7)
    assert [type(result) for result in results] == [Reply, *[NoAnswer] * 4, Reply, Reply]
    attempts = [sum(asked.body["seed"] == seed for asked in api.asked) for seed in range(7)]
    assert all(count > 1 for count in attempts[1:4])
    assert attempts[4] == 1


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (
            lambda asked: fails(401, f"Incorrect API key: {KEY}"),
            "status 401: Incorrect API key: (hidden); OPENAI_API_KEY",
        ),
        (lambda asked: fails(403, "no"), "OPENAI_API_KEY is not accepted"),
        (lambda asked: fails(404, "The model `gpt` does not exist"), "does not exist; check the model's name"),
        (lambda asked: web.Response(status=404, text="404 page not found"), "often ends in /v1"),
        (lambda asked: fails(429, "You exceeded your quota", code="insufficient_quota"), "no credit left"),
        (lambda asked: fails(400, "no chat template"), "use --api-route completions"),
        (lambda asked: fails(400, "model: wrong"), "status 400: model: wrong"),
        (
            lambda asked: web.Response(status=302, headers={"Location": "https://x/?key=abc"}),
            "redirects to https://x/;",
        ),
    ],
)
async def test_what_no_retry_cures_is_one_line_at_once(
    answer: Callable[[Asked], web.StreamResponse], line: str
) -> None:
    with foreign_api(answered_by(answer)) as api:
        (error,) = await ask(api.url)
    assert isinstance(error, ModelUnavailable)
    assert line in str(error)
    assert str(error).isprintable()
    assert KEY not in str(error)
    assert f"gpt at {api.url}" in str(error)
    assert len(api.asked) == 1


async def test_after_a_first_answer_such_an_error_costs_its_episode_alone() -> None:
    answers = (lambda asked: says("up"), lambda asked: fails(401, "expired"), lambda asked: says("down"))
    with foreign_api(answered_by(*answers)) as api:
        first, second, third = await ask(api.url, times=3)
    assert isinstance(first, Reply)
    assert type(second) is NoAnswer
    assert third == Reply("down", True, "", 100, 7)


@pytest.mark.parametrize("status", [400, 413])
async def test_a_prompt_that_is_refused_is_an_empty_reply(status: int) -> None:
    with foreign_api(answered_by(lambda asked: fails(status, "maximum context length is 10"))) as api:
        (reply,) = await ask(api.url)
    assert isinstance(reply, Reply)
    assert reply.text == ""
    assert "the prompt is too long" in reply.refused


async def test_refused_connections_and_rubbish_are_found_out_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PATIENCE_S", 0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (error,) = await ask(f"http://127.0.0.1:{port}/v1", timeout_s=600.0)
    assert isinstance(error, ModelUnavailable)
    assert "is the server running?" in str(error)
    page = lambda asked: web.Response(text="<html>Welcome</html>", content_type="text/html")  # noqa: E731
    with foreign_api(answered_by(page)) as api:
        (error,) = await ask(api.url, timeout_s=600.0)
    assert "a web page in place of an answer" in str(error)


async def test_a_huge_body_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PATIENCE_S", 0.3)
    monkeypatch.setattr("env_servers.clients.bodies.MAX_ANSWER_BYTES", 1 << 20)
    huge = lambda asked: web.Response(body=b" " * (3 << 20))  # noqa: E731
    with foreign_api(answered_by(huge)) as api:
        (error,) = await ask(api.url)
    assert "longer than 1 MiB" in str(error)


async def test_the_key_is_in_no_reply_and_no_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    answers = (
        lambda asked: fails(500, f"while serving {asked.headers['Authorization']}"),
        lambda asked: fails(503, f"while serving {asked.headers['Authorization']}"),
        lambda asked: fails(503, "x" * (SHOWN_CHARS - 9) + KEY),  # messages are cut in the middle of the key
        lambda asked: web.Response(text="x" * (SHOWN - 9) + KEY),
        lambda asked: says("your key is " + KEY),
    )
    with foreign_api(answered_by(*answers)) as api:
        (reply,) = await ask(api.url)
    assert isinstance(reply, Reply)
    assert reply.text == "your key is (hidden)"
    assert "retrying: status 503: while serving Bearer (hidden)" in caplog.text
    assert "xxx" in caplog.text
    assert KEY[:4] not in caplog.text


async def test_a_text_goes_to_the_other_route() -> None:
    async def handler(asked: Asked) -> web.StreamResponse:
        return web.json_response({"choices": [{"text": " up", "finish_reason": "length"}]})

    def text(api: ForeignApi) -> ApiOptions:
        return ApiOptions(url=api.url, route="completions")

    with foreign_api(handler) as api:
        async with ApiModel("gpt", endpoint(text(api), {}), text(api), most_tokens=3, thoughts=False) as model:
            assert await model.ask("a\n>", temperature=0.0, seed=1) == Reply(" up", finished=False)
    assert api.asked[0].path == "/v1/completions"
    assert api.asked[0].body == {"model": "gpt", "prompt": "a\n>", "max_tokens": 3, "temperature": 0.0, "seed": 1}
