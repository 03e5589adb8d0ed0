"""What the machine or the container offers: driver, cards as each library counts them, compiler, memory, transfers."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anchorage.checks import cards as nvidia
from benchmarks.gpu_check.rows import Row, at_least, failed, holds, measured, skipped
from benchmarks.gpu_check.settings import CARD_NEEDED, Settings, cards
from benchmarks.parts.cluster import cluster

GIB = 2**30
SHM_GIB = 1.0
"""Least size of /dev/shm: NCCL, Ray's object store and vLLM's workers use it; Docker's default is 64 MiB."""
DESCRIPTORS = 4096
COPIED_MIB = 256
FOR_CPUS = "the installed packages are for CPUs"
_SOURCE = "#include <Python.h>\n#include <stdlib.h>\nint answer(void) { return abs(-42); }\n"


def driver(settings: Settings) -> Iterator[Row]:
    version = nvidia.driver_version()
    if nvidia.built_for_cuda() is None and settings.dry:
        yield skipped("driver", FOR_CPUS)
    elif nvidia.built_for_cuda() is None:
        yield failed("driver", f"{FOR_CPUS}: make setup DEVICE=gpu in a new checkout", version)
    else:
        problem = nvidia.driver_problem()
        yield holds("driver", version, problem is None, problem or "new enough for the installed CUDA")


def card_counts(settings: Settings) -> Iterator[Row]:
    """Cards as NVML, PyTorch and Ray count them."""
    counts = {"NVML": len(nvidia.cards() or []), "torch": cards(), "Ray": _counted_by_ray()}
    yield from judge_counts(counts, os.environ.get("CUDA_VISIBLE_DEVICES"), dry=settings.dry)


def judge_counts(counts: Mapping[str, int], visible: str | None, *, dry: bool) -> Iterator[Row]:
    """Compare the counts.

    Args:
        counts: by who counts. NVML counts all of the container, the others those of `CUDA_VISIBLE_DEVICES`.
        visible: that variable.
        dry: whether no card is needed.
    """
    for name, count in counts.items():
        yield measured(f"cards, {name}", count)
    compared = {name: count for name, count in counts.items() if name != "NVML" or visible is None}
    agree = len(set(compared.values())) == 1
    yield holds("cards, counts agree", " = ".join(map(str, compared.values())), agree, ", ".join(compared))
    if not dry:
        yield holds("cards, at least one", counts["torch"], counts["torch"] > 0, CARD_NEEDED)


def _counted_by_ray() -> int:
    """Cards of a cluster that is started here."""
    import ray

    with cluster():
        return int(ray.cluster_resources().get("GPU", 0))


def containers(settings: Settings) -> Iterator[Row]:
    """Cards that each container of a cluster offers (`card/UUID`), and that no card is in two of them."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        yield skipped("cards, containers", "no cluster: RAY_ADDRESS is not set")
        return
    yield from judge_containers(nvidia.nodes_at(address))


def judge_containers(nodes: Sequence[nvidia.Node]) -> Iterator[Row]:
    """Compare the nodes of a cluster, as `ray.nodes()` describes them."""
    alive = [node for node in nodes if node["Alive"]]
    for number, node in enumerate(alive):
        own = sum(name.startswith(nvidia.CARD) for name in node["Resources"])
        places = ", ".join(f"{node['Resources'][kind]:g} {kind}" for kind in nvidia.PLACES if kind in node["Resources"])
        offered = int(node["Resources"].get("GPU", 0))
        good = own == offered
        yield holds(f"cards, container {number} ({places or 'no places'})", own, good, f"Ray counts {offered} there")
    problem = nvidia.clash(alive, share=True)
    yield holds("cards, none in two containers", len(alive), problem is None, problem or "containers")


def each_card(settings: Settings) -> Iterator[Row]:
    """Name, memory, bandwidth and speed of each card."""
    import torch

    if not cards():
        yield skipped("card", CARD_NEEDED)
        return
    for number in range(cards()):
        facts = torch.cuda.get_device_properties(number)
        yield measured(f"card {number}", f"{facts.name}, compute capability {facts.major}.{facts.minor}")
        yield measured(f"card {number}, memory, GiB", facts.total_memory / GIB)
        free, whole = torch.cuda.mem_get_info(number)
        yield holds(f"card {number}, free share", free / whole, free > 0.9 * whole, "at least 0.9: nobody else uses it")
        yield measured(f"card {number}, bfloat16 products, TFLOPS", product_tflops(f"cuda:{number}"))
        yield measured(f"card {number}, memory, GB/s", copy_gb_s(f"cuda:{number}", f"cuda:{number}") * 2)
        yield measured(f"card {number}, from pinned host memory, GB/s", copy_gb_s("cpu", f"cuda:{number}"))
    yield holds("bfloat16", "supported", torch.cuda.is_bf16_supported(including_emulation=False), "recipes need it")


def product_tflops(device: str, size: int = 8192, repeats: int = 20) -> float:
    """Speed of products of bfloat16 matrices, in 10^12 operations a second."""
    import torch

    one = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    torch.mm(one, one)
    _synchronise(device)
    began = time.perf_counter()
    for _ in range(repeats):
        torch.mm(one, one)
    _synchronise(device)
    return 2 * size**3 * repeats / (time.perf_counter() - began) / 1e12


def copy_gb_s(source: str, target: str, mib: int = COPIED_MIB, repeats: int = 10) -> float:
    """Speed of a copy in GB/s; host memory is pinned where there is a card."""
    import torch

    pinned = source == "cpu" and target != "cpu"
    one = torch.zeros(mib * 2**20, dtype=torch.uint8, device=source, pin_memory=pinned)
    other = torch.empty_like(one, device=target)
    other.copy_(one)
    _synchronise(target)
    began = time.perf_counter()
    for _ in range(repeats):
        other.copy_(one, non_blocking=True)
    _synchronise(target)
    return one.nbytes * repeats / (time.perf_counter() - began) / 1e9


def _synchronise(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize(device)


def peer_to_peer(settings: Settings) -> Iterator[Row]:
    """Whether each pair of cards has access to each other's memory, and how fast a copy is."""
    import torch

    if cards() < 2:
        yield skipped("peer-to-peer", f"needs two cards, there are {cards()}")
        return
    pairs = [(one, other) for one in range(cards()) for other in range(cards()) if one != other]
    for one, other in pairs:
        direct = torch.cuda.can_device_access_peer(one, other)
        yield measured(f"peer-to-peer {one} → {other}", "direct" if direct else "through the host")
        yield measured(f"peer-to-peer {one} → {other}, GB/s", copy_gb_s(f"cuda:{one}", f"cuda:{other}"))
        yield copied_exactly(f"peer-to-peer {one} → {other}, content", f"cuda:{one}", f"cuda:{other}")


def copied_exactly(name: str, source: str, target: str) -> Row:
    """Copy random numbers there and compare them on the host: with broken access they arrive as zeros."""
    import torch

    one = torch.randint(1, 2**31, (2**20,), device=source)
    wrong = int((one.to(target).cpu() != one.cpu()).sum())
    return holds(name, wrong, wrong == 0, "numbers that are wrong: 0")


def compiler(settings: Settings) -> Iterator[Row]:
    """A C compiler with Python's and libc's headers, with which Triton compiles the launchers of its kernels."""
    found = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    if found is None and nvidia.built_for_cuda() is None:
        yield skipped("C compiler", f"none is installed; {FOR_CPUS}, which need none")
    elif found is None:
        yield failed("C compiler", "none is installed: apt-get install gcc libc6-dev python3-dev")
    else:
        yield compiled(found, settings)


def compiled(program: str, settings: Settings, source: str = _SOURCE) -> Row:
    """Compile a function, load it and call it."""
    folder = settings.folder / "compiled"
    folder.mkdir(exist_ok=True)
    (folder / "answer.c").write_text(source)
    library = folder / "answer.so"
    include = sysconfig.get_paths()["include"]
    command = [program, "-shared", "-fPIC", f"-I{include}", "-o", str(library), str(folder / "answer.c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        line = next((line for line in done.stderr.splitlines() if "error" in line), "it failed")
        return failed("C compiler", f"{line.strip()[:200]} (apt-get install gcc libc6-dev python3-dev)", "no library")
    answer = ctypes.CDLL(str(library)).answer()
    return holds("C compiler", "compiles a library", answer == 42, "and the library works")


def host(settings: Settings) -> Iterator[Row]:
    """Shared memory, memory and limits."""
    there = os.statvfs("/dev/shm")
    size, free = (there.f_frsize * blocks / GIB for blocks in (there.f_blocks, there.f_bavail))
    yield at_least("/dev/shm, size, GiB", size, SHM_GIB)
    yield at_least("/dev/shm, free, GiB", free, SHM_GIB)
    yield measured("memory, GiB", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB)
    yield measured("memory limit of the container, GiB", _container_limit())
    yield measured("cores", len(os.sched_getaffinity(0)))
    yield measured("locked memory, GiB", _limit(resource.RLIMIT_MEMLOCK, GIB))
    yield measured("processes", _limit(resource.RLIMIT_NPROC))
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    enough = descriptors == resource.RLIM_INFINITY or descriptors >= DESCRIPTORS
    yield holds("open files", _limit(resource.RLIMIT_NOFILE), enough, f"at least {DESCRIPTORS}")
    yield measured("temporary files, free, GiB", shutil.disk_usage(settings.folder).free / GIB)


def _limit(kind: int, unit: int = 1) -> float | int | str:
    hard: Any = resource.getrlimit(kind)[1]
    return "unlimited" if hard == resource.RLIM_INFINITY else (hard / unit if unit > 1 else hard)


def _container_limit() -> float | str:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(file) as limit:
                text = limit.read().strip()
        except OSError:
            continue
        return "unlimited" if text == "max" or int(text) > 2**60 else int(text) / GIB
    return "unknown"


CHECKS = (driver, card_counts, containers, each_card, peer_to_peer, compiler, host)
