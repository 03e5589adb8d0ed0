"""Compose on GPUs and on several hosts: docker-compose takes the merged files, and each service has its own cards."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import needs

ROOT = Path(__file__).resolve().parents[2]
BASE, GPU, HOSTS = (f"docker-compose{name}.yml" for name in ("", ".gpu", ".hosts"))
HERE = {"ANCHORAGE_FIRST_HOST": "10.0.0.1", "ANCHORAGE_NODE_ADDRESS": "10.0.0.2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("docker-compose") is None:
        pytest.skip(needs.DOCKER_COMPOSE)
    made = tmp_path_factory.mktemp("compose")
    for file in (BASE, GPU, HOSTS):
        shutil.copy(ROOT / file, made)
    subprocess.run([ROOT / "deploy" / "secrets.sh", made / "deploy" / "secrets"], check=True, capture_output=True)
    return made


def merged(folder: Path, *files: str, **variables: str) -> dict[str, Any]:
    """The services as docker-compose reads the files."""
    done = config(folder, *files, **variables)
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = yaml.safe_load(done.stdout)["services"]
    return services


def config(folder: Path, *files: str, **variables: str) -> subprocess.CompletedProcess[str]:
    options = [option for file in files for option in ("-f", file)]
    command = ["docker-compose", *options, "--profile", "train", "--profile", "observe", "config"]
    environment = {"PATH": os.environ["PATH"], "ANCHORAGE_DEVICE": "gpu", **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_each_service_has_the_cards_that_are_named_for_it(folder: Path) -> None:
    services = merged(folder, BASE, GPU, ANCHORAGE_ACTOR_GPUS="1,2,3", ANCHORAGE_LEARNER_GPUS="0")
    cards = {
        name: service["environment"]["NVIDIA_VISIBLE_DEVICES"]
        for name, service in services.items()
        if service.get("runtime") == "nvidia"
    }
    assert cards == {"actor": "1,2,3", "learner": "0"}
    assert not any("NVIDIA_VISIBLE_DEVICES" in services[name].get("environment", {}) for name in ("head", "trainer"))


def test_cards_of_the_defaults_are_different_ones(folder: Path) -> None:
    services = merged(folder, BASE, GPU)
    cards = [services[name]["environment"]["NVIDIA_VISIBLE_DEVICES"] for name in ("actor", "learner")]
    assert len(set(cards)) == 2


def test_the_override_changes_nothing_else(folder: Path) -> None:
    services = merged(folder, BASE, GPU, ANCHORAGE_PYTHON_IMAGE="python@sha256:0")
    assert services["actor"]["image"] == services["trainer"]["image"] == "anchorage:0.1.0-gpu"
    assert services["learner"]["build"]["args"] == {"BASE": "python@sha256:0", "DEVICE": "gpu", "PIP_ARGS": ""}
    assert services["actor"]["environment"]["RAY_ADDRESS"] == "head:6379"
    assert services["actor"]["depends_on"] == {"head": {"condition": "service_healthy"}}
    assert services["actor"]["cap_drop"] == ["ALL"]


def test_memory_follows_the_variables(folder: Path) -> None:
    variables = {
        "ANCHORAGE_OBJECT_STORE_BYTES": "17179869184",
        "ANCHORAGE_SHM": "18g",
        "ANCHORAGE_ACTOR_MEMORY": "34g",
        "ANCHORAGE_LEARNER_MEMORY": "50g",
        "ANCHORAGE_TRAINER_MEMORY": "29g",
    }
    services = merged(folder, BASE, GPU, **variables)
    for name, limit in (("actor", "34g"), ("learner", "50g"), ("trainer", "29g")):
        assert (services[name]["mem_limit"], services[name]["shm_size"]) == (limit, "18g")
        assert services[name]["environment"]["ANCHORAGE_OBJECT_STORE_BYTES"] == "17179869184"


def test_what_is_compiled_is_on_a_volume_where_the_image_looks_for_it(folder: Path) -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    for name in ("actor", "learner"):
        assert "compiled:/var/cache/anchorage:rw" in merged(folder, BASE, GPU)[name]["volumes"]
    for variable in ("TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
        assert re.search(rf"{variable}=/var/cache/anchorage/\w+", dockerfile)
    # A new volume gets the owner of the image's folder.
    assert re.search(r"install -d -o anchorage -g anchorage [^\n]*/var/cache/anchorage", dockerfile)


def test_nodes_of_several_hosts_are_on_the_hosts_networks(folder: Path) -> None:
    services = merged(folder, BASE, GPU, HOSTS, **HERE, ANCHORAGE_RUNS="/shared/runs")
    nodes = {name: service for name, service in services.items() if service.get("network_mode") == "host"}
    assert set(nodes) == {"head", "actor", "learner", "trainer"}
    ports = {service["environment"]["ANCHORAGE_RAYLET_PORT"] for service in nodes.values()}
    assert len(ports) == len(nodes)
    for service in nodes.values():
        assert (service["ipc"], service["ulimits"]["memlock"]) == ("host", -1)
        assert service["environment"]["ANCHORAGE_NODE_ADDRESS"] == "10.0.0.2"
        assert service["environment"]["RAY_ADDRESS"] == "10.0.0.1:6378"
        assert service["cap_drop"] == ["ALL"]
        assert not service.get("networks")
    head = services["head"]["environment"]
    assert head["ANCHORAGE_HEAD_PORT"] == "6378"  # Redis is published at 6379
    assert all("/shared/runs:/app/runs:rw" in services[name]["volumes"] for name in ("learner", "trainer", "control"))


def test_on_several_hosts_only_one_address_is_published(folder: Path) -> None:
    services = merged(folder, BASE, GPU, HOSTS, **HERE)
    for name in ("redis", "alfworld", "webshop"):
        [port] = services[name]["ports"]
        assert str(port).startswith("10.0.0.1:") or port["host_ip"] == "10.0.0.1"
        assert set(services[name]["networks"]) == {"default", "outside"}


def test_infiniband_is_handed_in_where_it_is_named(folder: Path) -> None:
    plain = merged(folder, BASE, GPU, HOSTS, **HERE)
    assert plain["learner"]["devices"] == ["/dev/null:/dev/null"]
    there = merged(folder, BASE, GPU, HOSTS, **HERE, ANCHORAGE_INFINIBAND="/dev/infiniband", NCCL_IB_HCA="mlx5")
    assert there["learner"]["devices"] == ["/dev/infiniband:/dev/infiniband"]
    assert there["learner"]["environment"]["NCCL_IB_HCA"] == "mlx5"


def test_several_hosts_need_their_addresses(folder: Path) -> None:
    done = config(folder, BASE, GPU, HOSTS, ANCHORAGE_NODE_ADDRESS="10.0.0.2")
    assert done.returncode != 0
    assert "the address of the first host" in done.stderr
