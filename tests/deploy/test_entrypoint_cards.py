"""The entry point of actors and learners: a node offers what its cards allow, and does not start without a driver."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """#!{python}
import sys
sys.path.insert(0, {root!r})
from anchorage.checks import cards

cards._version = lambda name: {{"vllm": "0.32.0", "nvidia-cuda-runtime": "13.0.96"}}.get(name)
cards.driver_version = lambda: {driver!r}
cards.cards = lambda: {cards!r}
cards.nodes_at = lambda head: []
sys.exit(cards.main(sys.argv[3:]))
"""


@pytest.fixture
def head() -> Iterator[str]:
    """The address of something that accepts connections, as a head does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def started(
    folder: Path, head: str, role: str, cards: list[str], driver: str = "580.65.06", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the entry point with `python` that sees these cards, and `ray` that prints its arguments."""
    python = STAND_IN.format(python=sys.executable, root=str(ROOT), driver=driver, cards=cards)
    for name, text in (("python", python), ("ray", '#!/bin/sh\nprintf "%s\\n" "$@"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "RAY_AUTH_TOKEN": "secret", "RAY_ADDRESS": head}
    command = [ROOT / "deploy" / "entrypoint.sh", role]
    return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True)


def offered(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stdout.splitlines()
    return lines[lines.index("--resources") + 1]


def test_an_actor_offers_a_place_for_each_card(tmp_path: Path, head: str) -> None:
    done = started(tmp_path, head, "actor", ["GPU-a", "GPU-b", "GPU-c"])
    assert offered(done) == '{"rollout": 3, "card/GPU-a": 1, "card/GPU-b": 1, "card/GPU-c": 1}'


def test_an_actor_offers_a_place_for_each_group_of_cards(tmp_path: Path, head: str) -> None:
    done = started(tmp_path, head, "actor", ["GPU-a", "GPU-b"], ANCHORAGE_TENSOR_PARALLEL="2")
    assert offered(done).startswith('{"rollout": 1, ')


def test_a_learner_offers_the_places_that_are_named(tmp_path: Path, head: str) -> None:
    done = started(tmp_path, head, "learner", ["GPU-a", "GPU-b"], ANCHORAGE_LEARNER_PLACES="1")
    assert offered(done) == '{"learner": 1, "card/GPU-a": 1, "card/GPU-b": 1}'


@pytest.mark.parametrize("role", ["actor", "learner"])
def test_an_old_driver_is_refused_in_a_line_before_ray_starts(tmp_path: Path, head: str, role: str) -> None:
    done = started(tmp_path, head, role, ["GPU-a"], driver="570.86.10")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "anchorage: NVIDIA driver 570.86.10 is too old for CUDA 13: install driver 580 or newer on the host "
        "(containers use the host's driver)"
    ]


def test_cards_that_do_not_divide_are_refused_in_a_line(tmp_path: Path, head: str) -> None:
    done = started(tmp_path, head, "actor", ["GPU-a", "GPU-b", "GPU-c"], ANCHORAGE_TENSOR_PARALLEL="2")
    assert done.returncode == 2
    assert done.stderr.startswith("anchorage: 3 card(s) cannot be divided into places of 2:")


@pytest.mark.parametrize(
    ("role", "variable", "value"),
    [
        ("actor", "ANCHORAGE_TENSOR_PARALLEL", "0"),
        ("actor", "ANCHORAGE_ROLLOUT_PLACES", "two"),
        ("learner", "ANCHORAGE_LEARNER_PLACES", "-1"),
    ],
)
def test_a_wrong_number_is_refused_in_a_line_with_its_variable(
    tmp_path: Path, head: str, role: str, variable: str, value: str
) -> None:
    done = started(tmp_path, head, role, ["GPU-a"], **{variable: value})
    assert done.returncode == 2
    assert done.stderr == f"anchorage: {variable}: must be a whole number >= 1, got '{value}'\n"


def test_a_node_has_the_address_and_the_port_that_are_named(tmp_path: Path, head: str) -> None:
    done = started(tmp_path, head, "actor", ["GPU-a"], ANCHORAGE_NODE_ADDRESS="10.0.0.2", ANCHORAGE_RAYLET_PORT="6381")
    lines = done.stdout.splitlines()
    assert lines[lines.index("--node-ip-address") + 1] == "10.0.0.2"
    assert lines[lines.index("--node-manager-port") + 1] == "6381"
