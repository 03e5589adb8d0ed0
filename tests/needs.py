"""What some tests need and a machine may lack: why they are skipped and what to do, told together at the end.

A reason to skip reads "WHAT is missing: HOW to get it", the same for all tests with that need, so that the summary
has a line a need. Details such as paths do not belong into it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

CHROMIUM = "Chromium is missing: apt-get install chromium"
PLAYWRIGHT = "playwright is missing: pip install -r requirements/dev.txt"
KUBERNETES_VALIDATE = "kubernetes-validate is missing: pip install -r requirements/dev.txt"
MLFLOW = "mlflow is missing: pip install mlflow-skinny"
TRACKIO = "trackio is missing: pip install trackio"
WANDB = "wandb is missing: pip install -r requirements/dev.txt"
PANDAS = "pandas is missing: pip install pandas"
POLARS = "polars is missing: pip install polars"
PYARROW = "pyarrow is missing: pip install pyarrow"
VLLM = "vLLM is missing: make setup"
TEXTWORLD = "TextWorld, the official ALFWorld engine, is missing: make tools, with a C++ compiler"
DOCKER_COMPOSE = "docker-compose is missing: apt-get install docker-compose"
LIBFAKETIME = "libfaketime is missing: apt-get install libfaketime"
REDIS_SERVER = "redis-server 7 is missing: apt-get install redis-server"
ROOT = "root is missing: a small file system can be mounted by root alone"
GPUS = "two GPUs are missing: these tests run vLLM and NCCL on a machine that has them"
NO_GPU = "not applicable: this machine has a GPU"
KUBERAY = "KubeRay's ray.io_rayclusters.yaml is missing: set RAYCLUSTER_CRD to its path"
ALFWORLD = "the official ALFWorld games are missing: set ALFWORLD_DATA to their folder"
WEBSHOP = "the official WebShop files are missing: set WEBSHOP_DATA to their folder"
AGENT_FRAMEWORKS = "LangGraph and the OpenAI Agents SDK are missing: give pip a package index (tests/agent_venvs.py)"
TRANSCRIPTS = "recordings of the original environments are missing: set REFERENCE_DIR to their folder"


def debian(*packages: str) -> str:
    """The reason where Debian packages are missing."""
    return f"{', '.join(packages)} missing: apt-get install {' '.join(packages)}"


def summary(reports: Iterable[object]) -> list[str]:
    """What was not run: how many tests in all, then a line a reason, the most frequent first.

    Each report is pytest's, of a skipped test or file.
    """
    reasons = Counter(_reason(report) for report in reports)
    if not reasons:
        return []
    width = len(str(max(reasons.values())))
    lines = [f"  {count:>{width}}  {reason}" for reason, count in reasons.most_common()]
    return [f"{sum(reasons.values())} tests were skipped:", *lines]


def _reason(report: object) -> str:
    longrepr = getattr(report, "longrepr", None)
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ").partition("\n")[0]
