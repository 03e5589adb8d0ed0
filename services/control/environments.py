"""The state of a run's environment servers, by HTTP.

Invariants
- Only addresses from the run's own folder are called, concurrently, each for `TOTAL_S` in all, and at most
  `MAX_BYTES` of a response are read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import orjson
from prometheus_client.parser import text_string_to_metric_families

from services.config.masking import masked
from services.control.runs import Run
from services.control.views import EnvironmentView

TIMEOUT_S = 2.0
"""Time limit of a connection, and of the wait for each part of a response."""
TOTAL_S = 10.0
"""Time limit of all requests to a server."""
MAX_BYTES = 2**20
AT_ONCE = 32
MAX_NAME_CHARS = 200
TOKEN_VARIABLE = "ANCHORAGE_ENV_TOKEN"


def addresses(run: Run) -> list[str]:
    """Addresses of the run's environment servers: the configured ones, else those that the run itself started."""
    environments = run.config.environments if run.config is not None else ()
    return [url for env in environments for url in env.addresses or _started(run.folder / f"{env.name}.url")]


def _started(ready: Path) -> list[str]:
    try:
        url = ready.read_text().strip()
    except OSError:
        return []
    return [url] if url else []


def ask_all(urls: Sequence[str]) -> list[EnvironmentView]:
    """The state of each server now, `AT_ONCE` of them at a time."""
    with ThreadPoolExecutor(max(1, min(AT_ONCE, len(urls)))) as pool:
        return [*pool.map(ask, urls)]


def ask(url: str) -> EnvironmentView:
    """The state of a server now. A server that does not respond has `reachable` False and the reason in `detail`."""
    deadline = time.monotonic() + TOTAL_S
    token = os.environ.get(TOKEN_VARIABLE)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=headers, trust_env=False) as client:
            info = orjson.loads(_get(client, "/info", deadline))
            samples = {
                sample.name: sample.value
                for family in text_string_to_metric_families(_get(client, "/metrics", deadline).decode())
                for sample in family.samples
            }
        return EnvironmentView(
            url=masked(url),
            reachable=True,
            detail="reachable",
            name=str(info["name"])[:MAX_NAME_CHARS],
            splits={str(name): int(size) for name, size in info["splits"].items()},
            sessions=samples.get("anchorage_env_sessions"),
            steps=samples.get("anchorage_env_steps_total"),
            faults=samples.get("anchorage_env_faults_total"),
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return EnvironmentView(url=masked(url), reachable=False, detail=f"unreachable: {type(error).__name__}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return EnvironmentView(url=masked(url), reachable=False, detail="not an environment server: invalid response")


def _get(client: httpx.Client, path: str, deadline: float) -> bytes:
    """The body. `deadline`: of `time.monotonic()`; httpx itself limits only the wait for each part."""
    with client.stream("GET", path) as response:
        response.raise_for_status()
        body = b""
        for part in response.iter_bytes():
            body += part
            if len(body) > MAX_BYTES:
                raise ValueError("the response is too long")
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("the response is too slow")
        return body
