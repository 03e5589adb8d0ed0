"""Whatever a fuzzer makes of a server's own OpenAPI document: no 5xx, no hang, and nothing that the document denies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from env_servers.launch import ServerProcess
from env_servers.registry import ENVIRONMENTS
from tests.env_servers.launching import COUNTING, launch

QUICK = [(name,) for name in ENVIRONMENTS if not name.endswith("-textworld")]
MIB = 2**20
EXAMPLES = 25
LIVE = ("/step", "/batch/step", "/close", "/agentgym/step", "/agentgym/observation")
"""Routes that are asked about sessions that live, too: a fuzzer never guesses one.

`/agentgym/reset` is left to `Alive`: schemathesis 4 takes the `prefixItems` of its answer for a mistake.
"""


@pytest.fixture(scope="module", params=[*QUICK, (COUNTING, "--workers", "2")], ids=" ".join)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    ready = tmp_path_factory.mktemp("fuzzed") / "ready"
    with launch(ready, *request.param, "--max-sessions", "64", "--idle-seconds", "5") as server:
        yield server


@pytest.fixture(scope="module")
def fuzzed(server: ServerProcess) -> ServerProcess:
    """The server after everything was sent to it once."""
    everything(server)
    return server


def operations_of(server: ServerProcess) -> list[Any]:
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return [found.ok() for found in api.get_all_operations()]


def fuzz(cases: Any, prepare: Any = None, excluded: Sequence[Any] = ()) -> None:
    """Send what the strategy makes and compare the answers with the document, but for the excluded checks."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def send(case: schemathesis.Case) -> None:
        if prepare is not None:
            prepare(case)
        case.call_and_validate(timeout=30, excluded_checks=list(excluded))

    send()


class Alive:
    """Puts a session that lives into cases that are valid by the document, and ends the one before."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._split = next(iter(http.get("/info").json()["splits"]))
        self._last: tuple[str, dict[str, Any]] | None = None

    def prepare(self, case: schemathesis.Case) -> None:
        if self._last is not None:
            path, body = self._last
            self._http.post(path, json=body)
        if case.path.startswith("/agentgym"):
            self._name_environment(case)
        elif case.path == "/batch/step":
            session = self._session()
            case.body = {"items": [{**item, "session": session, "step": 1} for item in case.body["items"]]}
        else:
            case.body = {**case.body, "session": self._session(), **({"step": 1} if case.path == "/step" else {})}

    def _session(self) -> str:
        answer = self._http.post("/reset", json={"split": self._split, "index": 0}).raise_for_status()
        session = str(answer.json()["session"])
        self._last = "/close", {"session": session}
        return session

    def _name_environment(self, case: schemathesis.Case) -> None:
        made = self._http.post("/agentgym/create").raise_for_status().json()
        name, number = ("id", made["id"]) if isinstance(made, dict) else ("env_idx", made)
        self._last = "/agentgym/close", {name: number}
        task = {"game": 0} if name == "id" else {"session_id": 0}
        self._http.post("/agentgym/reset", json={name: number, **task}).raise_for_status()
        if case.path == "/agentgym/step":
            case.body = {**case.body, name: number}
        else:
            case.query = {**case.query, name: number}


def everything(server: ServerProcess) -> None:
    # A number may name a process that is not there, which is a 410: schemathesis would have a 404.
    excluded = [positive_data_acceptance] if psutil.Process(server.pid).children() else []
    with httpx.Client(base_url=server.url, timeout=30) as http:
        alive = Alive(http)
        for operation in operations_of(server):
            wrong = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
            fuzz(operation.as_strategy() | wrong, excluded=excluded)
            if operation.path in LIVE:
                fuzz(operation.as_strategy(), alive.prepare)


def test_every_route(fuzzed: ServerProcess) -> None:
    assert {operation.path for operation in operations_of(fuzzed)} >= {*LIVE, "/reset", "/batch/reset", "/mcp"}
    lines = httpx.get(f"{fuzzed.url}/metrics").text.splitlines()
    counts = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}
    assert counts["anchorage_env_steps_total"] >= 2 * EXAMPLES, "the environment's step was hardly reached"
    assert (counts["anchorage_env_faults_total"], counts.get('anchorage_env_errors_total{status="500"}', 0)) == (0, 0)


def test_doing_it_all_again_takes_no_more_memory(fuzzed: ServerProcess) -> None:
    assert fuzzed.alive
    processes = [psutil.Process(fuzzed.pid), *psutil.Process(fuzzed.pid).children()]
    before = sum(process.memory_info().rss for process in processes)
    everything(fuzzed)
    assert sum(process.memory_info().rss for process in processes) - before < 16 * MIB
