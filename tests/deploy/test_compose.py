"""The compose files: every service confined and watched, nothing published but on loopback, no secret in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = sorted(name for name, service in SERVICES.items() if "build" in service)


def secret_files(service: str) -> set[str]:
    return {Path(file).stem for file in SERVICES[service].get("env_file", [])}


def test_the_services_are_those_of_the_documentation() -> None:
    assert set(SERVICES) == {
        *("redis", "alfworld", "webshop", "head", "control", "actor", "learner", "trainer", "prometheus", "grafana")
    }
    assert {name for name, service in SERVICES.items() if "profiles" not in service} == {
        *("redis", "alfworld", "webshop", "head", "control", "actor", "learner")
    }


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_is_watched_and_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"]
    assert service["user"].split(":")[0] not in ("", "0", "root")
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert service["restart"] in ("unless-stopped", "on-failure")
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service


def test_only_control_plane_and_grafana_are_published_on_loopback_by_default() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"control", "grafana"}
    assert all("127.0.0.1:" in port for ports in published.values() for port in ports)
    assert {name for name, service in SERVICES.items() if "outside" in service.get("networks", ())} == set(published)
    assert COMPOSE["networks"]["default"] == {"internal": True}


def test_each_service_has_the_secrets_it_needs_and_no_others() -> None:
    assert {name: secret_files(name) for name in SERVICES} == {
        "redis": {"redis"},
        "alfworld": {"environment"},
        "webshop": {"environment"},
        "head": {"ray"},
        "actor": {"ray"},
        "learner": {"ray"},
        "control": {"redis", "environment", "control"},
        "trainer": {"ray", "redis", "environment"},
        "prometheus": {"environment", "control"},
        "grafana": {"grafana"},
    }


def test_what_a_run_needs_is_healthy_before_it_starts() -> None:
    waits = SERVICES["trainer"]["depends_on"]
    assert set(waits) == {"redis", "alfworld", "webshop", "head", "actor", "learner"}
    assert all(wait == {"condition": "service_healthy"} for wait in waits.values())


def test_data_and_runs_are_volumes() -> None:
    assert {"redis", "runs"} <= set(COMPOSE["volumes"])
    for name in ("control", "learner", "trainer"):
        assert "runs:/app/runs" in SERVICES[name]["volumes"]


def test_a_run_is_given_time_to_write_its_checkpoint() -> None:
    assert int(SERVICES["trainer"]["stop_grace_period"].rstrip("s")) >= 120


@pytest.mark.parametrize("name", OURS)
def test_our_images_are_built_from_files_that_exist_for_our_user(name: str) -> None:
    dockerfile = (ROOT / SERVICES[name]["build"]["dockerfile"]).read_text()
    assert "USER 10001:10001" in dockerfile
    assert "HEALTHCHECK" in dockerfile
    assert SERVICES[name]["user"] == "10001:10001"
    for source in re.findall(r"^COPY (?!--from)(\S+)", dockerfile, re.MULTILINE):
        assert (ROOT / source).exists(), source


def test_no_image_floats() -> None:
    images = [service["image"] for service in SERVICES.values()]
    assert not [image for image in images if ":" not in image or image.endswith(":latest")]


@pytest.mark.parametrize("name", OURS)
def test_the_base_image_can_be_pinned_by_its_digest(name: str) -> None:
    build = SERVICES[name]["build"]
    dockerfile = (ROOT / build["dockerfile"]).read_text()
    [default] = re.findall(r"^ARG BASE=(\S+)$", dockerfile, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {"${BASE}"}
    given = re.fullmatch(r"\$\{(ANCHORAGE_\w+_IMAGE):-(\S+)\}", build["args"]["BASE"])
    assert given is not None
    assert given[2] == default
    assert given[1] in (ROOT / "docs" / "deploy.md").read_text()
