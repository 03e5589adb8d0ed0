"""Reading Kubernetes documents: the pods they start, what selects them, who may reach whom, what a tree refers to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod template and the document that it is of; a group of a RayCluster has its `ray start` parameters."""

    owner: Document
    template: Document
    ray: Mapping[str, str]

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.template["metadata"]["labels"]
        return labels

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def spec(self) -> Document:
        spec: Document = self.template["spec"]
        return spec

    @property
    def container(self) -> Document:
        """The only one."""
        [container] = self.spec["containers"]
        found: Document = container
        return found

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", [])}

    @property
    def volumes(self) -> set[str]:
        """Names of what can be mounted, claims that a StatefulSet makes included."""
        claims = self.owner["spec"].get("volumeClaimTemplates", [])
        return {volume["name"] for volume in self.spec.get("volumes", [])} | {
            claim["metadata"]["name"] for claim in claims
        }


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def names(documents: list[Document], kind: str) -> set[str]:
    return {document["metadata"]["name"] for document in of_kind(documents, kind)}


def pods(documents: list[Document]) -> list[Pod]:
    found = [
        Pod(document, document["spec"]["template"], {})
        for document in of_kind(documents, "Deployment", "StatefulSet", "Job")
    ]
    for cluster in of_kind(documents, "RayCluster"):
        groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
        found += [Pod(cluster, group["template"], group["rayStartParams"]) for group in groups]
    return found


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector (matchLabels, matchExpressions with In) takes these labels."""
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


def admitted(documents: list[Document], target: Pod) -> set[tuple[str, int | None]] | None:
    """Who reaches `target`, as (component or namespace, port; none: all of them); None: no policy, so everybody."""
    policies = [
        policy["spec"]
        for policy in of_kind(documents, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"], target.labels) and "Ingress" in policy["spec"]["policyTypes"]
    ]
    if not policies:
        return None
    found = set()
    for rule in (rule for policy in policies for rule in policy.get("ingress", [])):
        for peer in rule["from"]:
            for port in rule.get("ports", [{"port": None}]):
                found |= {(who, port["port"]) for who in _peers(documents, peer)}
    return found


def _peers(documents: list[Document], peer: Document) -> set[str]:
    if "namespaceSelector" in peer:
        return set(peer["namespaceSelector"]["matchLabels"].values())
    return {pod.component for pod in pods(documents) if selects(peer["podSelector"], pod.labels)}


def values_of(tree: object, key: str) -> Iterator[Any]:
    """All that stands under `key` anywhere in `tree`."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from values_of(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from values_of(value, key)
