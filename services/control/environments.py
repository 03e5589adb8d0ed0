"""The environment servers of a run, asked over HTTP how they are.

Invariants
- Only addresses from the run's own folder are asked, side by side, each for `TIMEOUT_S` at most, and at most
  `MAX_BYTES` are read.
"""

from __future__ import annotations

import os
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
MAX_BYTES = 2**20
AT_ONCE = 32
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
    """The servers as they answer now; it takes as long as the slowest of `AT_ONCE`."""
    with ThreadPoolExecutor(max(1, min(AT_ONCE, len(urls)))) as pool:
        return [*pool.map(ask, urls)]


def ask(url: str) -> EnvironmentView:
    """The server as it answers now; one that does not is said to be out of reach."""
    token = os.environ.get(TOKEN_VARIABLE)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=headers, trust_env=False) as client:
            info = orjson.loads(_get(client, "/info"))
            samples = {
                sample.name: sample.value
                for family in text_string_to_metric_families(_get(client, "/metrics").decode())
                for sample in family.samples
            }
        return EnvironmentView(
            url=masked(url),
            reachable=True,
            detail="answers",
            name=str(info["name"]),
            splits={str(name): int(size) for name, size in info["splits"].items()},
            sessions=samples.get("anchorage_env_sessions"),
            steps=samples.get("anchorage_env_steps_total"),
            faults=samples.get("anchorage_env_faults_total"),
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return EnvironmentView(url=masked(url), reachable=False, detail=f"does not answer: {type(error).__name__}")
    except (ValueError, KeyError, TypeError, AttributeError):
        return EnvironmentView(url=masked(url), reachable=False, detail="does not answer as an environment server")


def _get(client: httpx.Client, path: str) -> bytes:
    with client.stream("GET", path) as response:
        response.raise_for_status()
        body = b""
        for part in response.iter_bytes():
            body += part
            if len(body) > MAX_BYTES:
                raise ValueError("the answer is too long")
        return body
