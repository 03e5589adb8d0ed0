"""Whatever a fuzzer makes of a server's own OpenAPI document: no 5xx, no hang, and nothing that the document denies."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from env_servers.launch import ServerProcess
from env_servers.registry import ENVIRONMENTS
from tests.env_servers.launching import launch

QUICK = [name for name in ENVIRONMENTS if not name.endswith("-textworld")]
MIB = 2**20


@pytest.fixture(scope="module", params=QUICK)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    ready = tmp_path_factory.mktemp("fuzzed") / "ready"
    with launch(ready, request.param, "--max-sessions", "64", "--idle-seconds", "5") as server:
        yield server


def test_every_route(server: ServerProcess) -> None:
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in api.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/reset", "/step", "/batch/step", "/agentgym/step", "/mcp"}
    for operation in operations:

        @settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy() | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
        def send(case: schemathesis.Case) -> None:
            case.call_and_validate(timeout=30)

        send()


def test_the_server_is_still_there_and_has_not_grown(server: ServerProcess) -> None:
    assert server.alive
    assert psutil.Process(server.pid).memory_info().rss < 400 * MIB
