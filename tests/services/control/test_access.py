"""Tokens, limits and headers: who gets in, who does not, and what every answer carries."""

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from services.control.access import RateLimiter
from services.control.app import create_app
from services.control.settings import ControlRefused, ControlSettings, token_from
from tests.control_server import ADMIN, READ

PATHS = ["/api/v1/runs", "/api/v1/me", "/api/v1/runs/finished/metrics", "/api/v1/runs/finished/events", "/metrics"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic " + READ, "Bearer", f"Bearer {READ}x"])
def test_nothing_is_told_without_the_token(settings, path, header):
    with TestClient(create_app(settings)) as client:
        response = client.get(path, headers={"Authorization": header} if header else {})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["content-type"] == "application/problem+json"


def test_either_token_may_look(settings):
    with TestClient(create_app(settings)) as client:
        for token, role in ((READ, "read"), (ADMIN, "admin")):
            answer = client.get("/api/v1/me", headers={"Authorization": f"Bearer {token}"})
            assert answer.json() == {"role": role, "open": False}


def test_pages_need_no_token_and_hold_no_data(settings):
    with TestClient(create_app(settings)) as client:
        page = client.get("/")
        assert page.status_code == 200
        assert "finished" not in page.text
        assert client.get("/static/js/app.js").status_code == 200
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/static/../app.py").status_code == 404


def test_pages_may_run_nothing_but_our_files(settings):
    with TestClient(create_app(settings)) as client:
        for path in ("/", "/static/js/app.js", "/api/v1/runs", "/nope"):
            headers = client.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "require-trusted-types-for 'script'" in policy
            assert headers["x-content-type-options"] == "nosniff"
        assert client.get("/api/v1/runs").headers["cache-control"] == "no-store"


def test_an_open_server_answers_to_local_names_alone(runs):
    app = create_app(ControlSettings(runs=runs))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/api/v1/me").json() == {"role": "admin", "open": True}
        assert client.get("/api/v1/runs", headers={"Host": "evil.example"}).status_code == 400


def test_a_foreign_page_can_make_no_browser_act(runs):
    """What a browser sends to another origin without asking first has no JSON content type."""
    with TestClient(create_app(ControlSettings(runs=runs)), base_url="http://127.0.0.1") as client:
        headers = {"Content-Type": "text/plain", "Origin": "http://evil.example"}
        sent = client.post("/api/v1/runs/finished/actions", content='{"action": "stop"}', headers=headers)
        assert sent.status_code == 422
        asked = client.options(
            "/api/v1/runs/finished/actions", headers={**headers, "Access-Control-Request-Method": "POST"}
        )
        assert "access-control-allow-origin" not in asked.headers


def test_beyond_the_limit_one_waits(runs):
    settings = ControlSettings(runs=runs, read_token=SecretStr(READ), requests_per_minute=40)
    with TestClient(create_app(settings)) as client:
        assert client.get("/api/v1/me", headers={"Authorization": f"Bearer {READ}"}).status_code == 200
        assert client.get("/api/v1/me", headers={"Authorization": "Bearer guess"}).status_code == 401
        for _ in range(40):
            answer = client.get("/api/v1/me", headers={"Authorization": "Bearer guess"})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1


def test_the_limiter_remembers_few_clients_and_forgives():
    limiter = RateLimiter(60)
    for client in range(10_000):
        assert limiter.take(str(client)) == 0
    assert len(limiter._left) <= 4096
    assert limiter.take("one", cost=60) == 0
    assert 0 < limiter.take("one") < 3


def test_without_a_token_it_stays_at_home(runs):
    with pytest.raises(ControlRefused, match=r"listening on 0\.0\.0\.0 requires a token"):
        ControlSettings(runs=runs, host="0.0.0.0").check()
    ControlSettings(runs=runs, host="0.0.0.0", read_token=SecretStr(READ)).check()
    for host in ("127.0.0.1", "::1", "localhost"):
        ControlSettings(runs=runs, host=host).check()


def test_bad_tokens_are_refused(runs, tmp_path):
    with pytest.raises(ControlRefused, match="at least 16"):
        ControlSettings(runs=runs, read_token=SecretStr("short")).check()
    with pytest.raises(ControlRefused, match="must differ"):
        ControlSettings(runs=runs, read_token=SecretStr(READ), admin_token=SecretStr(READ)).check()
    with pytest.raises(ControlRefused, match="not a directory"):
        ControlSettings(runs=tmp_path / "nothing").check()


def test_a_token_comes_from_the_environment_or_a_file(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{READ}\n")
    assert token_from("T", {}) is None
    assert token_from("T", {"T": READ}) == SecretStr(READ)
    assert token_from("T", {"T_FILE": str(file)}) == SecretStr(READ)
    with pytest.raises(ControlRefused, match="both T and T_FILE"):
        token_from("T", {"T": READ, "T_FILE": str(file)})
    with pytest.raises(ControlRefused, match="cannot read the token file"):
        token_from("T", {"T_FILE": str(tmp_path / "none")})
    file.write_text("\n")
    with pytest.raises(ControlRefused, match="is empty"):
        token_from("T", {"T_FILE": str(file)})
