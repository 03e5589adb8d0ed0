"""Values that between them take every branch of the chart's templates both ways."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "anchorage"
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
ALFWORLD, WEBSHOP = DEFAULTS["environments"]
GPU_NODES = {
    "nodeSelector": {"node-type": "gpu"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
}

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "trainer": {"trainer": {"enabled": True}},
    "overrides": {"trainer": {"enabled": True, "overrides": ["run.name=first", 'run.name="first: #1"']}},
    "redis elsewhere": {"redis": {"external": "redis.example:6380"}, "trainer": {"enabled": True}},
    "claims": {
        "secret": "their-secret",
        "runs": {"existingClaim": "their-runs"},
        "models": {"existingClaim": "their-models"},
        "environments": [{**ALFWORLD, "dataClaim": "their-data"}, {**WEBSHOP, "replicas": 3}],
        "trainer": {"enabled": True},
    },
    "storage classes": {"runs": {"storageClass": "nfs"}, "redis": {"storageClass": "ssd"}},
    "no GPUs": {"rollout": {"min": 0, "gpus": 0}, "learner": {"gpus": 0}},
    "many GPUs": {"rollout": {"max": 8, "gpus": 2, **GPU_NODES}, "learner": {"ranks": 4, "gpus": 4, **GPU_NODES}},
    "several hosts": {
        "nodes": {"hostNetwork": True, "rdma": "rdma/hca", "objectStoreBytes": 17179869184, "shm": "18Gi"},
        "networkPolicy": {"enabled": False},
        "learner": {"pods": 2, "ranks": 8, "gpus": 8},
        "cache": {"existingClaim": "their-cache"},
        "trainer": {"enabled": True},
    },
    "registry": {"image": {"pullSecrets": [{"name": "registry"}]}, "trainer": {"enabled": True}},
    "open network": {"networkPolicy": {"enabled": False}},
    "dashboard for others": {
        "control": {"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}]}
    },
    "metrics for others": {
        "metrics": {"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]}
    },
}


def merged(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the templates see them: mappings are merged into the defaults, all else replaces them."""
    return _merge(DEFAULTS, values)


def _merge(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(dict(defaults))
    for key, value in values.items():
        tree[key] = _merge(tree[key], value) if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
    return tree
