"""The control plane as a process: fuzzed from its own OpenAPI document, its event stream, its metrics, its command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import GenerationMode

from services.buffer import Buffer
from services.telemetry import MetricsWriter
from tests.control_runs import UPDATES, beat, make_finished, scalars
from tests.control_server import ADMIN, LIVE

HEADERS = {"Authorization": f"Bearer {ADMIN}"}


def test_every_route_as_a_fuzzer_sees_it(url: str, buffer: Buffer) -> None:
    api = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in api.get_all_operations()]
    assert len(operations) >= 18
    for operation in operations:
        if operation.path.endswith("/events"):
            continue  # it does not end; see below
        for run in ("finished", LIVE, None):
            _fuzz(operation, run)
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def _fuzz(operation: schemathesis.APIOperation, run: str | None) -> None:
    """Requests that the document allows and others, for a made-up run and for a real one.

    Every answer must be as the document says. For requests that it does not allow of a real run, only a failure of the
    server counts: the name that was put in may have been all that was wrong with them.
    """
    if run is not None and "{run}" not in operation.path:
        return
    allowed = operation.as_strategy()
    any_ = allowed | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    for strategy, judged in ((any_, True),) if run is None else ((allowed, True), (any_, False)):

        @settings(
            max_examples=8,
            deadline=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def send(case: schemathesis.Case) -> None:
            if run is not None:
                case.path_parameters["run"] = run
            response = case.call(headers=HEADERS, timeout=30)
            assert response.status_code < 500, f"{case.method} {case.path}: {response.text}"
            if judged:  # noqa: B023 (called before the loop goes on)
                case.validate_response(response)

        send()


def test_events_tell_what_is_and_then_what_changes(url: str, buffer: Buffer, folder: Path) -> None:
    path = f"{url}/api/v1/runs/{LIVE}/events"
    with httpx.stream("GET", path, headers=HEADERS, timeout=30) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = _events(response)
        first = {}
        while len(first) < 5:
            name, data = next(events)
            first[name] = data
        assert set(first) == {"metrics", "run", "buffer", "actors", "commands"}
        assert len(first["metrics"]["records"]) == UPDATES + 2
        with MetricsWriter(folder / LIVE) as metrics:
            metrics.write(UPDATES + 1, scalars(UPDATES + 1))
        buffer.set_state("paused")
        news = {}
        while not {"metrics", "run"} <= set(news):
            name, data = next(events)
            news[name] = data
    assert [record["step"] for record in news["metrics"]["records"]] == [UPDATES + 1]
    assert news["run"]["update"] == UPDATES + 1
    buffer.set_state("running")


def test_a_resumed_run_is_told_from_its_start(url: str, buffer: Buffer, folder: Path) -> None:
    make_finished(folder, "resumed")
    path, step = f"{url}/api/v1/runs/resumed/events", UPDATES + 1
    with httpx.stream("GET", path, headers=HEADERS, timeout=30) as response:
        known = next(data for name, data in _events(response) if name == "metrics")
    assert len(known["records"]) == UPDATES + 2
    seen = {"after": known["next"], "generation": known["generation"]}
    with httpx.stream("GET", path, params=seen, headers=HEADERS, timeout=30) as response:
        events = _events(response)
        assert next(data for name, data in events if name == "metrics") == {**known, "records": []}
        # Back to before the first update: nothing is left to send, and that is told.
        MetricsWriter(folder / "resumed", resume_step=-1).close()
        emptied = next(data for name, data in events if name == "metrics")
    assert (emptied["records"], emptied["next"]) == ([], 0)
    assert emptied["generation"] != known["generation"]
    with MetricsWriter(folder / "resumed") as metrics:
        for _ in range(UPDATES + 9):  # more than were known
            metrics.write(step, scalars(step))
    # Who comes again after that has nothing of what it knew.
    with httpx.stream("GET", path, params=seen, headers=HEADERS, timeout=30) as response:
        again = next(data for name, data in _events(response) if name == "metrics")
    assert [record["step"] for record in again["records"]] == [step] * (UPDATES + 9)
    shutil.rmtree(folder / "resumed")


def test_prometheus_reads_what_is_live(url: str, buffer: Buffer) -> None:
    beat(buffer, LIVE)
    httpx.get(f"{url}/api/v1/runs", headers=HEADERS)  # a request to count
    text = httpx.get(f"{url}/metrics", headers=HEADERS).text
    samples = {(s.name, s.labels.get("run")): s for f in text_string_to_metric_families(text) for s in f.samples}
    assert samples["anchorage_run_live", LIVE].value == 1
    assert samples["anchorage_run_live", "finished"].value == 0
    assert samples["anchorage_actor_tokens_per_s", LIVE].value == 812.5
    assert samples["anchorage_learner_loss_clip_fraction", LIVE].value == 0.02
    assert ("anchorage_learner_loss_clip_fraction", "finished") not in samples
    assert 0 <= samples["anchorage_actor_heard_seconds", LIVE].value < 60
    assert samples["anchorage_actor_kv_use", LIVE].value == 0.25
    assert samples["anchorage_redis_used_bytes", LIVE].value > 10**5
    assert samples["anchorage_redis_clients", LIVE].value >= 1
    assert samples["anchorage_redis_aof_healthy", LIVE].value == 1
    assert ("anchorage_redis_used_bytes", "finished") not in samples
    assert samples["anchorage_control_requests_total", None].value > 0


def test_status_tells_the_same(buffer: Buffer, folder: Path) -> None:
    facts = json.loads(_status(folder / LIVE, "--json"))
    assert facts["run"]["live"]
    assert facts["buffer"]["complete_groups"] == [100]
    assert facts["checkpoints"] == [UPDATES]
    text = _status(folder / "finished")
    assert "ended; data from the run's folder; its Redis stopped with it" in text
    assert f"{UPDATES} of 20" in text


def test_the_command_refuses_what_is_unsafe(folder: Path, buffer: Buffer) -> None:
    command = [sys.executable, "-m", "anchorage.cli.main", "control", str(folder), "--host", "0.0.0.0", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.startswith("anchorage: listening on 0.0.0.0 requires a token")
    assert len(ended.stderr.splitlines()) == 1


def _status(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "anchorage.cli.main", "status", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def _events(response: httpx.Response) -> Iterator[tuple[str, dict[str, object]]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("data:"):
            yield name, json.loads(line[5:])
