"""The Helm chart rendered with many values: what comes out fits together, is confined, and is what its readers take."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from services.config import load_config
from tests.deploy.chart_variants import CHART, VARIANTS, merged
from tests.deploy.conftest import RELEASE, Render
from tests.deploy.manifests import Document, Pod, admitted, names, of_kind, pods, selects, values_of

ROOT = CHART.parents[2]
DEPLOY = (ROOT / "docs" / "deploy.md").read_text()
ENTRYPOINT = (ROOT / "deploy" / "entrypoint.sh").read_text()
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
RAY, REDIS, ENVIRONMENTS = "ray", "redis", "environment"
CLIENTS = ("ray", "trainer", "control")


@dataclass(frozen=True)
class Rendering:
    values: dict[str, Any]
    documents: list[Document]

    @property
    def pods(self) -> list[Pod]:
        return pods(self.documents)

    def component(self, name: str) -> list[Pod]:
        return [pod for pod in self.pods if pod.component == name]


@pytest.fixture(params=VARIANTS, scope="module")
def chart(request: pytest.FixtureRequest, render: Render) -> Rendering:
    values = VARIANTS[request.param]
    return Rendering(merged(values), render(values))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variants_are_values_that_the_schema_allows(name: str) -> None:
    jsonschema.validate(merged(VARIANTS[name]), SCHEMA)


def test_the_variants_take_every_branch_both_ways() -> None:
    text = "".join(path.read_text() for path in (CHART / "templates").glob("*.[yt]*l"))
    conditions = set(re.findall(r"\b(?:if|with|range)\b[^}]*?(?:\.Values|(\$environment))((?:\.[A-Za-z]+)+)", text))
    assert len(conditions) >= 12
    for of_environment, path in conditions - {("", ".environments")}:
        seen = set()
        for variant in map(merged, VARIANTS.values()):
            for place in variant["environments"] if of_environment else [variant]:
                for key in path.strip(".").split("."):
                    place = place[key]
                seen.add(bool(place))
        assert seen == {True, False}, path


def test_documents_have_names_of_their_own(chart: Rendering) -> None:
    seen = [(document["apiVersion"], document["kind"], document["metadata"]["name"]) for document in chart.documents]
    assert len(set(seen)) == len(seen)
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name) for _, _, name in seen)
    for document in chart.documents:
        assert document["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE
        assert re.match(rf"{RELEASE}(-|$)", document["metadata"]["name"])


def test_what_is_turned_off_is_not_there(chart: Rendering) -> None:
    values = chart.values
    assert bool(chart.component("trainer")) == values["trainer"]["enabled"]
    assert bool(chart.component(REDIS)) == (not values["redis"]["external"])
    assert bool(names(chart.documents, "PersistentVolumeClaim")) == (not values["runs"]["existingClaim"])
    assert bool(names(chart.documents, "NetworkPolicy")) == values["networkPolicy"]["enabled"]
    assert len(chart.component(ENVIRONMENTS)) == len(values["environments"])


def test_the_trainer_is_told_its_recipe_and_overrides(chart: Rendering) -> None:
    wanted = chart.values["trainer"]
    for pod in chart.component("trainer"):
        assert pod.container["args"] == ["trainer", wanted["recipe"], "--resume=auto", *wanted["overrides"]]


def test_every_volume_is_there_and_mounted_once(chart: Rendering) -> None:
    values = chart.values
    theirs = {values[name]["existingClaim"] for name in ("runs", "models", "cache")}
    theirs |= {environment["dataClaim"] for environment in values["environments"]}
    claims = names(chart.documents, "PersistentVolumeClaim") | theirs - {""}
    referred = set(values_of(chart.documents, "claimName"))
    assert referred == claims
    for pod in chart.pods:
        mounts = pod.container["volumeMounts"]
        assert sorted(mount["name"] for mount in mounts) == sorted(pod.volumes)
        assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
    assert not list(values_of(chart.documents, "hostPath"))


def test_secrets_are_the_documented_one_with_its_keys(chart: Rendering) -> None:
    [cluster] = of_kind(chart.documents, "RayCluster")
    references = list(values_of(chart.documents, "secretKeyRef"))
    secrets = {reference["name"] for reference in references}
    assert secrets | {cluster["spec"]["authOptions"]["secretName"]} == {chart.values["secret"]}
    documented = set(re.findall(r"--from-literal=([\w-]+)=", DEPLOY))
    assert {reference["key"] for reference in references} | {"auth_token"} == documented  # KubeRay reads that key
    for pod in chart.pods:
        assert pod.spec.get("imagePullSecrets", []) == chart.values["image"]["pullSecrets"]
    for key in ("configMap", "configMapKeyRef", "configMapRef", "secretRef", "serviceAccountName"):
        assert not list(values_of(chart.documents, key)), key


def test_selectors_take_the_pods_that_they_mean(chart: Rendering) -> None:
    for document in of_kind(chart.documents, "Deployment", "StatefulSet"):
        taken = [pod.owner for pod in chart.pods if selects(document["spec"]["selector"], pod.labels)]
        assert taken == [document]
    for service in of_kind(chart.documents, "Service"):
        taken = [pod.owner for pod in chart.pods if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        assert [owner["metadata"]["name"] for owner in taken] == [service["metadata"]["name"]]
    for policy in of_kind(chart.documents, "NetworkPolicy"):
        assert [pod for pod in chart.pods if selects(policy["spec"]["podSelector"], pod.labels)], policy["metadata"]
    for document in of_kind(chart.documents, "StatefulSet"):
        assert document["spec"]["serviceName"] in names(chart.documents, "Service")


def test_services_and_probes_ask_ports_that_are_open(chart: Rendering) -> None:
    for service in of_kind(chart.documents, "Service"):
        [pod] = [pod for pod in chart.pods if service["spec"]["selector"].items() <= pod.labels.items()]
        for port in service["spec"]["ports"]:
            assert port.get("targetPort", port["port"]) == pod.ports[port["name"]]
    for pod in chart.pods:
        if pod.owner["kind"] == "Job":
            continue
        for kind in ("readinessProbe", "livenessProbe"):
            probe = pod.container[kind]
            if "exec" in probe:
                assert probe["exec"]["command"] == ["anchorage-redis", "healthy"]
            elif "httpGet" in probe:
                assert probe["httpGet"] == {"path": "/health", "port": "http"}
                assert "http" in pod.ports
            else:
                assert str(probe["tcpSocket"]["port"]) == pod.ray["node-manager-port"]


def test_pods_of_the_images_entrypoint_are_roles_that_it_has(chart: Rendering) -> None:
    for pod in chart.pods:
        arguments = pod.container.get("args", [])
        assert "command" not in pod.container
        if pod.component in ("control", "trainer", ENVIRONMENTS):
            role = re.search(rf"^  {arguments[0]}\)$(.*?)^    ;;$", ENTRYPOINT, re.MULTILINE | re.DOTALL)
            assert role is not None
            given = {variable["name"] for variable in pod.container["env"]}
            assert set(re.findall(r"\bneed (\w+)", role[1])) <= given
            assert "need_redis" not in role[1] or {"ANCHORAGE_REDIS_PASSWORD", "ANCHORAGE_REDIS_HOST"} <= given
            assert all(str(port) in re.findall(r"--port (\d+)", role[1]) for port in pod.ports.values())
        else:
            assert not arguments


def test_addresses_are_those_of_services(chart: Rendering) -> None:
    services = {
        f"{service['metadata']['name']}:{port['port']}"
        for service in of_kind(chart.documents, "Service")
        for port in service["spec"]["ports"]
    }
    [cluster] = of_kind(chart.documents, "RayCluster")
    [head] = [pod for pod in chart.component(RAY) if pod.ports]
    services.add(f"{cluster['metadata']['name']}-head-svc:{head.ports['gcs']}")  # KubeRay makes this one
    services.add(chart.values["redis"]["external"])
    for variable in (variable for variables in values_of(chart.documents, "env") for variable in variables):
        if variable["name"] in ("RAY_ADDRESS", "ANCHORAGE_REDIS_HOST"):
            assert variable["value"] in services


def test_no_pod_has_more_rights_than_it_needs(chart: Rendering) -> None:
    [cluster] = of_kind(chart.documents, "RayCluster")
    for pod in chart.pods:
        security = pod.spec["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"], security["runAsGroup"]) == (True, 10001, 10001)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        container = pod.container["securityContext"]
        assert (container["allowPrivilegeEscalation"], container["capabilities"]) == (False, {"drop": ["ALL"]})
        assert container.get("readOnlyRootFilesystem", False) == (pod.component in (REDIS, ENVIRONMENTS, "control"))
        # The autoscaler in the head's pod asks Kubernetes' API; nobody else does.
        is_head = pod.template is cluster["spec"]["headGroupSpec"]["template"]
        assert pod.spec.get("automountServiceAccountToken", True) == is_head
        assert not {"hostPID", "hostIPC", "privileged", "runAsRoot"} & {*pod.spec, *container}
        on_host = chart.values["nodes"]["hostNetwork"] and "resources" in pod.ray
        assert pod.spec.get("hostNetwork", False) == on_host
    autoscaler = cluster["spec"]["autoscalerOptions"]["securityContext"]
    assert (autoscaler["allowPrivilegeEscalation"], autoscaler["capabilities"]) == (False, {"drop": ["ALL"]})


def test_every_container_has_resources_and_no_more_than_its_limit(chart: Rendering) -> None:
    from ray.autoscaler._private.kuberay.utils import parse_quantity

    for pod in chart.pods:
        requests, limits = pod.container["resources"]["requests"], pod.container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(requests)
        assert parse_quantity(requests["memory"]) <= parse_quantity(limits["memory"])
        assert limits.get("nvidia.com/gpu", 0) == int(pod.ray.get("num-gpus", "0"))
        rdma = chart.values["nodes"]["rdma"]
        assert limits.get(rdma, 0) == (1 if rdma and "resources" in pod.ray else 0)


def test_redis_has_room_beyond_its_data(chart: Rendering) -> None:
    from ray.autoscaler._private.kuberay.utils import parse_quantity

    for pod in chart.component(REDIS):
        [most] = [v["value"] for v in pod.container["env"] if v["name"] == "ANCHORAGE_REDIS_MAXMEMORY"]
        assert parse_quantity(most.replace("gb", "Gi")) < parse_quantity(pod.container["resources"]["limits"]["memory"])


def test_policies_let_in_who_must_and_nobody_else(chart: Rendering) -> None:
    values = chart.values
    clients = {name for name in CLIENTS if chart.component(name)}
    ray = {(name, None) for name in ("ray", "trainer") if chart.component(name)}
    operator = (values["networkPolicy"]["operatorNamespace"], None)
    lookers, scrapers = (
        {name for peer in values[who]["from"] for name in peer["namespaceSelector"]["matchLabels"].values()}
        for who in ("control", "metrics")
    )
    expected = {
        REDIS: {(client, 6379) for client in clients},
        ENVIRONMENTS: {(client, 8001) for client in clients | scrapers},
        "ray": {*ray, operator},
        "trainer": {*ray, operator},
        "control": {(name, 8080) for name in lookers | scrapers},
    }
    for pod in chart.pods:
        wanted = expected[pod.component] if values["networkPolicy"]["enabled"] else None
        assert admitted(chart.documents, pod) == wanted, pod.component


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of packages that Ray's command line imports
def test_ray_starts_with_options_that_it_has(chart: Rendering) -> None:
    from ray.scripts.scripts import start

    options = {option for parameter in start.params for option in parameter.opts}
    for pod in chart.component(RAY):
        assert {f"--{name}" for name in pod.ray} <= options
        assert all(isinstance(value, str) for value in pod.ray.values())
        if "resources" in pod.ray:  # KubeRay writes it into a shell's line as it stands
            [argument] = shlex.split(f"--resources={pod.ray['resources']}")
            assert json.loads(argument.removeprefix("--resources=")).keys() <= {"rollout", "learner"}


def test_rays_autoscaler_reads_the_groups(chart: Rendering) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    [cluster] = of_kind(chart.documents, "RayCluster")
    metadata = {**cluster["metadata"], "namespace": "default"}
    groups = _derive_autoscaling_config_from_ray_cr({**cluster, "metadata": metadata})["available_node_types"]
    rollout, learner = groups["rollout"], groups["learner"]
    wanted = chart.values["rollout"], chart.values["learner"]
    assert (rollout["min_workers"], rollout["max_workers"]) == (wanted[0]["min"], wanted[0]["max"])
    assert (learner["min_workers"], learner["max_workers"]) == (wanted[1]["pods"], wanted[1]["pods"])
    for group, name, places, gpus in (
        (rollout, "rollout", 1, wanted[0]["gpus"]),
        (learner, "learner", wanted[1]["ranks"], wanted[1]["gpus"]),
    ):
        assert {key: group["resources"][key] for key in ("CPU", "GPU", name)} == {"CPU": 1, "GPU": gpus, name: places}
    assert groups["headgroup"]["resources"]["CPU"] == 0


def test_the_documented_values_render(render: Render) -> None:
    block = re.search(r"```yaml\n# my-values.yaml\n(.*?)```", DEPLOY, re.DOTALL)
    assert block is not None
    values = yaml.safe_load(block[1])
    jsonschema.validate(merged(values), SCHEMA)
    documents = render(values, "anchorage")
    config = load_config(ROOT / values["trainer"]["recipe"], values["trainer"]["overrides"])
    servers = {
        f"http://{name}-{replica}.{document['spec']['serviceName']}:8001"
        for document in of_kind(documents, "StatefulSet")
        for name in [document["metadata"]["name"]]
        for replica in range(document["spec"]["replicas"])
    }
    assert set(config.env.urls) <= servers
    [trainer] = [pod for pod in pods(documents) if pod.component == "trainer"]
    assert f"{config.model.path}".startswith("models/")
    assert "/app/models" in {mount["mountPath"] for mount in trainer.container["volumeMounts"]}


def test_fewer_places_at_most_than_at_least_are_refused_in_a_line(render: Render) -> None:
    with pytest.raises(ValueError, match=r"rollout\.min \(5\) is greater than rollout\.max \(4\)"):
        render({"rollout": {"min": 5}})


def test_pods_that_share_a_hosts_network_have_ports_of_their_own(chart: Rendering) -> None:
    ports = [pod.ray["node-manager-port"] for pod in chart.component(RAY)]
    assert len(set(ports)) == len(ports) == 3


def test_the_object_store_fits_into_shared_memory(chart: Rendering) -> None:
    from ray.autoscaler._private.kuberay.utils import parse_quantity

    wanted = chart.values["nodes"]["objectStoreBytes"]
    for pod in (pod for pod in chart.pods if "resources" in pod.ray or pod.component == "trainer"):
        stated = pod.ray.get("object-store-memory") or next(
            (one["value"] for one in pod.container.get("env", ()) if one["name"] == "ANCHORAGE_OBJECT_STORE_BYTES"), "0"
        )
        assert int(stated) == wanted
        [shm] = [volume for volume in pod.spec["volumes"] if volume["name"] == "shm"]
        assert int(stated) < parse_quantity(shm["emptyDir"]["sizeLimit"])


def test_what_is_compiled_is_kept_where_the_image_looks_for_it(chart: Rendering) -> None:
    for pod in (pod for pod in chart.pods if "resources" in pod.ray):
        [mount] = [mount for mount in pod.container["volumeMounts"] if mount["name"] == "compiled"]
        assert mount == {"name": "compiled", "mountPath": "/var/cache/anchorage"}
        [volume] = [volume for volume in pod.spec["volumes"] if volume["name"] == "compiled"]
        claim = chart.values["cache"]["existingClaim"]
        assert ("persistentVolumeClaim" in volume) == bool(claim)
        assert pod.spec["securityContext"]["fsGroup"] == 10001  # so that our user may write to it


def test_the_hosts_network_with_network_policies_is_refused_in_a_line(render: Render) -> None:
    with pytest.raises(ValueError, match=r"nodes\.hostNetwork: .*set networkPolicy\.enabled=false"):
        render({"nodes": {"hostNetwork": True}})


def test_pods_with_cards_check_the_driver_first(chart: Rendering) -> None:
    for pod in (pod for pod in chart.pods if "resources" in pod.ray):
        first, gpus = pod.spec.get("initContainers", []), int(pod.ray["num-gpus"])
        assert len(first) == (1 if gpus else 0)
        for check in first:
            assert check["command"][:3] == ["python", "-m", "anchorage.checks.cards"]
            [kind] = check["command"][3:]
            assert f'"{kind}"' in shlex.split(f"--resources={pod.ray['resources']}")[0]
            assert check["image"] == pod.container["image"]
            assert check["securityContext"] == pod.container["securityContext"]
            assert check["resources"]["limits"]["nvidia.com/gpu"] == gpus  # those of the pod, not more
