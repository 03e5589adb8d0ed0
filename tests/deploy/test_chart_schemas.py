"""The rendered chart against the schemas of its readers: Kubernetes' own kinds and, where its file is given, KubeRay's.

`RAYCLUSTER_CRD` names KubeRay's `ray.io_rayclusters.yaml`, which is not kept here.
"""

from __future__ import annotations

import copy
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from tests import needs
from tests.deploy.chart_variants import CHART, VARIANTS
from tests.deploy.conftest import Render
from tests.deploy.manifests import Document, of_kind, pods

OLDEST = yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"].removeprefix(">=").partition("-")[0]

# Fields of a RayCluster in KubeRay 1.6, the oldest that the documentation allows.
SPEC = {
    *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec"),
    *("headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs"),
}
AUTHENTICATION = {"enableK8sTokenAuth", "mode", "secretName"}
AUTOSCALER = {
    *("env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources", "securityContext"),
    *("upscalingMode", "version", "volumeMounts"),
}
GROUP = {"labels", "rayStartParams", "resources", "template"}
HEAD = GROUP | {"enableIngress", "headService", "serviceType"}
WORKERS = GROUP | {
    *("groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "replicas", "scaleStrategy"),
    "suspend",
}


@pytest.fixture(params=VARIANTS, scope="module")
def documents(request: pytest.FixtureRequest, render: Render) -> list[Document]:
    return render(VARIANTS[request.param])


def _validate(document: Document) -> None:
    _validate_text(json.dumps(document))


@cache  # most documents are the same in many variants
def _validate_text(document: str) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason=needs.KUBERNETES_VALIDATE)
    for version in (OLDEST, kubernetes.latest_version()):
        kubernetes.validate(json.loads(document), version, strict=True)


def test_kubernetes_takes_every_kind_of_its_own(documents: list[Document]) -> None:
    for document in documents:
        if document["kind"] != "RayCluster":
            _validate(document)


def test_kubernetes_takes_the_pods_of_the_ray_cluster(documents: list[Document]) -> None:
    of_ray = [pod for pod in pods(documents) if pod.owner["kind"] == "RayCluster"]
    assert len(of_ray) == 3
    for pod in of_ray:
        name = {"name": "of-the-ray-cluster"}
        _validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": name, "template": pod.template})


def test_what_kubernetes_does_not_know_is_noticed(render: Render) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason=needs.KUBERNETES_VALIDATE)
    [deployment] = copy.deepcopy(of_kind(render({}), "Deployment"))
    deployment["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes.ValidationError):
        _validate(deployment)


def test_the_ray_cluster_has_fields_that_kuberay_has(documents: list[Document]) -> None:
    [cluster] = of_kind(documents, "RayCluster")
    spec = cluster["spec"]
    assert cluster["apiVersion"] == "ray.io/v1"
    assert set(spec) <= SPEC
    assert set(spec["authOptions"]) <= AUTHENTICATION
    assert set(spec["autoscalerOptions"]) <= AUTOSCALER
    assert set(spec["headGroupSpec"]) <= HEAD
    for group in spec["workerGroupSpecs"]:
        assert {"groupName", "maxReplicas", "minReplicas", "template"} <= set(group) <= WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@cache
def _ray_cluster_schema() -> dict[str, Any]:
    path = os.environ.get("RAYCLUSTER_CRD")
    if path is None:
        pytest.skip(needs.KUBERAY)
    definition = yaml.load(Path(path).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [schema] = [version["schema"] for version in definition["spec"]["versions"] if version["name"] == "v1"]
    closed: dict[str, Any] = _closed(schema["openAPIV3Schema"])
    return closed


def _closed(schema: Any) -> Any:
    """The schema with unknown properties refused: Kubernetes drops them without a word."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def test_kuberay_takes_the_ray_cluster(documents: list[Document]) -> None:
    [cluster] = of_kind(documents, "RayCluster")
    jsonschema.Draft7Validator(_ray_cluster_schema()).validate(cluster)
    cluster = copy.deepcopy(cluster)
    cluster["spec"]["workerGroupSpecs"][0]["maximum"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(_ray_cluster_schema()).validate(cluster)
