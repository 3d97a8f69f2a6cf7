"""infra/kubernetes: valid against the published schemas, and at one with itself and the code."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kustomize import Object, render, renderers

from cluster.session.serving import APPLICATIONS
from cluster.settings import Settings

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "infra" / "kubernetes"
OVERLAYS = ("dev", "prod")
KUBERNETES_VERSION = "1.33"
CRDS = os.environ.get("HELIOSTAT_KUBERAY_CRDS")
# Made by hand, as docs/infrastructure.md says: no secret stands in a file.
SECRET_KEYS = {
    ("heliostat-database", "platform_url"),
    ("heliostat-database", "mlflow_url"),
    ("heliostat-signing-key", "signing_key.pem"),
    ("ray-auth-token", "auth_token"),
}
SECRETS = {name for name, _ in SECRET_KEYS} | {"heliostat-trusted-keys"}
RAY_COMPONENTS = ("serving", "training")

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@dataclass(frozen=True)
class Pod:
    """A pod template, how many of it there are at least, and whether it stays up."""

    name: str
    labels: dict[str, str]
    spec: dict[str, Any]
    min_count: int
    is_job: bool = False

    @property
    def containers(self) -> list[Object]:
        return self.spec.get("initContainers", []) + self.spec["containers"]

    @property
    def ports(self) -> dict[str, int]:
        listed = [port for c in self.spec["containers"] for port in c.get("ports", [])]
        return {port["name"]: port["containerPort"] for port in listed}


@cache
def _rendered(overlay: str) -> list[Object]:
    return render(KUBERNETES / "overlays" / overlay)


def objects(overlay: str, kind: str) -> dict[str, Object]:
    found = [item for item in _rendered(overlay) if item["kind"] == kind]
    return {item["metadata"]["name"]: copy.deepcopy(item) for item in found}


def ray_clusters(overlay: str) -> dict[str, Object]:
    """Component → RayClusterSpec."""
    return {
        "serving": objects(overlay, "RayService")["heliostat"]["spec"]["rayClusterConfig"],
        "training": objects(overlay, "RayCluster")["training"]["spec"],
    }


def pods(overlay: str) -> Iterator[Pod]:
    for component, cluster in ray_clusters(overlay).items():
        yield _pod(f"{component} head", cluster["headGroupSpec"]["template"], 1)
        for group in cluster["workerGroupSpecs"]:
            name = f"{component} {group['groupName']} worker"
            yield _pod(name, group["template"], group["minReplicas"])
    for name, job in objects(overlay, "RayJob").items():
        template = job["spec"]["submitterPodTemplate"]
        yield Pod(name, template["metadata"]["labels"], template["spec"], 1, is_job=True)
    for name, deployment in objects(overlay, "Deployment").items():
        yield _pod(name, deployment["spec"]["template"], deployment["spec"]["replicas"])


def _pod(name: str, template: Object, min_count: int) -> Pod:
    return Pod(name, template["metadata"]["labels"], template["spec"], min_count)


def selected(overlay: str, selector: Object) -> list[Pod]:
    """The pods that a LabelSelector (or a Service's plain selector) chooses."""
    labels = selector.get("matchLabels", {} if "matchExpressions" in selector else selector)
    expressions = selector.get("matchExpressions", [])
    assert all(e["operator"] == "In" for e in expressions)
    return [
        pod
        for pod in pods(overlay)
        if labels.items() <= pod.labels.items()
        and all(pod.labels.get(e["key"]) in e["values"] for e in expressions)
    ]


def test_every_file_of_the_base_is_listed_once() -> None:
    listed = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text())["resources"]
    files = {path.name for path in (KUBERNETES / "base").glob("*.yaml")} - {"kustomization.yaml"}
    assert sorted(listed) == sorted(files)


@every_overlay
def test_every_renderer_gives_the_same_objects(overlay: str) -> None:
    results = [renderer(KUBERNETES / "overlays" / overlay) for renderer in renderers()]
    for result in results:
        assert _by_identity(result) == _by_identity(results[0])


@every_overlay
def test_no_object_is_there_twice(overlay: str) -> None:
    assert len(_by_identity(_rendered(overlay))) == len(_rendered(overlay))


@every_overlay
def test_kubernetes_own_objects_follow_their_schemas(overlay: str) -> None:
    for item in _rendered(overlay):
        if not item["apiVersion"].startswith("ray.io/"):
            kubernetes_validate.validate(item, KUBERNETES_VERSION, strict=True)


@every_overlay
@pytest.mark.skipif(not CRDS, reason="HELIOSTAT_KUBERAY_CRDS names no folder of KubeRay's CRDs")
def test_ray_objects_follow_the_published_schemas(overlay: str) -> None:
    validators = _kuberay_validators(Path(CRDS or ""))
    custom = [item for item in _rendered(overlay) if item["apiVersion"] == "ray.io/v1"]
    assert {item["kind"] for item in custom} == {"RayCluster", "RayService", "RayJob"}
    for item in custom:
        validators[item["kind"]].validate(item)


@every_overlay
def test_containers_cannot_become_root_or_write_their_image(overlay: str) -> None:
    for pod in pods(overlay):
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"], pod.name
        assert security["runAsUser"] == 1000, pod.name  # as infra/docker/Dockerfile makes it
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, pod.name
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, pod.name
            assert "/tmp" in {m["mountPath"] for m in container.get("volumeMounts", [])} or (
                container in pod.spec.get("initContainers", [])
            ), f"{pod.name} has nowhere to write temporary files"


@every_overlay
def test_only_ray_heads_may_call_the_kubernetes_api(overlay: str) -> None:
    for pod in pods(overlay):
        is_head = pod.labels.get("heliostat.io/node") == "head"
        assert pod.spec["automountServiceAccountToken"] is is_head, pod.name


@every_overlay
def test_every_container_says_what_it_needs(overlay: str) -> None:
    for pod in pods(overlay):
        for container in pod.containers:
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][kind].keys(), pod.name
            assert re.fullmatch(r".+/heliostat-\w+:\d+\.\d+\.\d+", container["image"]), pod.name


@every_overlay
def test_everything_that_stays_up_is_probed_on_a_port_it_opens(overlay: str) -> None:
    for pod in (pod for pod in pods(overlay) if not pod.is_job):
        [container] = pod.spec["containers"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            port = container[probe]["httpGet"]["port"]
            assert port == 52365 or port in pod.ports, f"{pod.name}: {probe}"  # Ray's own agent


@every_overlay
def test_gpu_pods_ask_for_one_and_go_where_terraform_puts_them(overlay: str) -> None:
    for pod in pods(overlay):
        [limits] = [container["resources"]["limits"] for container in pod.spec["containers"]]
        pool = "gpu" if "nvidia.com/gpu" in limits else "cpu"
        assert pod.spec["nodeSelector"] == {"heliostat.io/pool": pool}, pod.name
        tolerated = {toleration["key"] for toleration in pod.spec.get("tolerations", [])}
        assert tolerated == ({"nvidia.com/gpu"} if pool == "gpu" else set()), pod.name


@every_overlay
def test_everything_that_a_pod_refers_to_exists(overlay: str) -> None:
    accounts, maps = objects(overlay, "ServiceAccount"), objects(overlay, "ConfigMap")
    for pod in pods(overlay):
        assert pod.spec["serviceAccountName"] in accounts, pod.name
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for container in pod.containers:
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted <= volumes.keys(), pod.name
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in maps, pod.name


@every_overlay
def test_the_secrets_referred_to_are_those_the_documentation_makes(overlay: str) -> None:
    keys, names = set(), set()
    for pod in pods(overlay):
        for container in pod.containers:
            for variable in container.get("env", []):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    keys.add((reference["name"], reference["key"]))
            for mount in container.get("volumeMounts", []):
                if "subPath" in mount:
                    keys.add((_secret_of(pod, mount["name"]), mount["subPath"]))
        names |= {v["secret"]["secretName"] for v in pod.spec["volumes"] if "secret" in v}
    assert keys == SECRET_KEYS
    assert names | {name for name, _ in keys} == SECRETS
    page = (ROOT / "docs" / "infrastructure.md").read_text(encoding="utf-8")
    for word in SECRETS | {key for _, key in SECRET_KEYS}:
        assert word in page, f"docs/infrastructure.md does not say how '{word}' is made"


@every_overlay
def test_only_training_holds_the_signing_key(overlay: str) -> None:
    holders = {
        pod.labels["heliostat.io/component"]
        for pod in pods(overlay)
        for volume in pod.spec["volumes"]
        if volume.get("secret", {}).get("secretName") == "heliostat-signing-key"
    }
    assert holders == {"training"}


@every_overlay
def test_services_reach_ports_that_their_pods_open(overlay: str) -> None:
    services = objects(overlay, "Service")
    assert services.keys() == {"gateway", "mlflow"}
    for name, service in services.items():
        behind = selected(overlay, service["spec"]["selector"])
        assert behind, f"Service '{name}' selects no pod"
        for port in service["spec"]["ports"]:
            assert all(pod.ports.get(port["targetPort"]) == port["port"] for pod in behind), name


@every_overlay
def test_nothing_is_open_by_default(overlay: str) -> None:
    rule = objects(overlay, "NetworkPolicy")["deny-all"]["spec"]
    assert rule == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@every_overlay
def test_network_policies_open_only_ports_that_exist(overlay: str) -> None:
    for name, policy in objects(overlay, "NetworkPolicy").items():
        spec = policy["spec"]
        targets = selected(overlay, spec["podSelector"])
        assert targets, f"NetworkPolicy '{name}' selects no pod"
        for rule in spec.get("ingress", []):
            assert rule["from"], f"NetworkPolicy '{name}' lets everybody in"
            _assert_opened(name, rule, targets)
            for pod_selector in _own_pods(rule["from"]):
                assert selected(overlay, pod_selector), name
        for rule in spec.get("egress", []):
            for pod_selector in _own_pods(rule["to"]):
                reached = selected(overlay, pod_selector)
                assert reached, name
                _assert_opened(name, rule, reached)


@every_overlay
def test_what_one_side_may_send_the_other_may_receive(overlay: str) -> None:
    flows = {"ingress": set(), "egress": set()}
    for policy in objects(overlay, "NetworkPolicy").values():
        near = {pod.name for pod in selected(overlay, policy["spec"]["podSelector"])}
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(direction, []):
                ports = [port["port"] for port in rule.get("ports", [])] or ["all"]
                for pod_selector in _own_pods(rule[peers]):
                    far = {pod.name for pod in selected(overlay, pod_selector)}
                    ends = (far, near) if direction == "ingress" else (near, far)
                    flows[direction] |= {(a, b, p) for a in ends[0] for b in ends[1] for p in ports}
    assert flows["ingress"] == flows["egress"]


@every_overlay
def test_disruption_budgets_protect_pods_and_can_be_kept(overlay: str) -> None:
    budgets = objects(overlay, "PodDisruptionBudget")
    covered = set()
    for name, budget in budgets.items():
        behind = selected(overlay, budget["spec"]["selector"])
        assert behind, f"PodDisruptionBudget '{name}' selects no pod"
        covered |= {pod.name for pod in behind}
        count = sum(pod.min_count for pod in behind)
        assert budget["spec"].get("minAvailable", 0) <= count, name
        if any(pod.labels["heliostat.io/component"] in RAY_COMPONENTS for pod in behind):
            assert "minAvailable" in budget["spec"], f"{name}: KubeRay's pods have no scale"
    assert {"serving head", "serving cpu worker", "training head", "mlflow"} <= covered


@every_overlay
def test_settings_are_ones_that_the_code_knows(
    overlay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = objects(overlay, "ConfigMap")["heliostat-settings"]["data"]
    own = {name: value for name, value in values.items() if name.startswith("HELIOSTAT_")}
    fields = {f"HELIOSTAT_{name.upper()}" for name in Settings.model_fields}
    assert own.keys() <= fields
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.storage_root == f"s3://heliostat-{overlay}-111122223333/platform"
    mlflow = objects(overlay, "Service")["mlflow"]["spec"]["ports"][0]["port"]
    assert settings.tracking_uri == f"http://mlflow:{mlflow}"
    [head] = ray_clusters(overlay)["training"]["headGroupSpec"]["template"]["spec"]["containers"]
    paths = {mount["mountPath"] for mount in head["volumeMounts"]}
    assert {str(settings.home), str(settings.keys_dir / "trusted")} <= paths


@every_overlay
def test_serve_runs_the_applications_that_up_runs(overlay: str) -> None:
    service = objects(overlay, "RayService")["heliostat"]["spec"]
    config = yaml.safe_load(service["serveConfigV2"])
    assert config["applications"] == list(APPLICATIONS)
    gateway = objects(overlay, "Service")["gateway"]["spec"]["ports"][0]["port"]
    assert config["http_options"]["port"] == gateway


@every_overlay
def test_every_ray_cluster_asks_for_the_token_and_has_the_pinned_version(overlay: str) -> None:
    pin = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None
    for cluster in ray_clusters(overlay).values():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-auth-token"}
        assert cluster["rayVersion"] == pin[1]


@every_overlay
def test_the_job_runs_on_a_cluster_that_exists(overlay: str) -> None:
    job = objects(overlay, "RayJob")["train-digits"]["spec"]
    assert job["clusterSelector"]["ray.io/cluster"] in objects(overlay, "RayCluster")
    entrypoint = re.fullmatch(r"python -m (\S+) --config /app/(\S+)", job["entrypoint"])
    assert entrypoint is not None
    assert (ROOT / entrypoint[1].replace(".", "/")).with_suffix(".py").is_file()
    assert (ROOT / entrypoint[2]).is_file()


def _by_identity(items: list[Object]) -> dict[tuple[str, str], Object]:
    return {(item["kind"], item["metadata"]["name"]): item for item in items}


def _secret_of(pod: Pod, volume_name: str) -> str:
    [volume] = [v for v in pod.spec["volumes"] if v["name"] == volume_name]
    return volume["secret"]["secretName"]


def _own_pods(peers: list[Object]) -> list[Object]:
    """Selectors of peers in our own namespace."""
    return [p["podSelector"] for p in peers if "podSelector" in p and "namespaceSelector" not in p]


def _assert_opened(policy: str, rule: Object, targets: list[Pod]) -> None:
    for port in rule.get("ports", []):
        for pod in targets:
            opened = pod.ports.values()
            assert port["port"] in opened, f"NetworkPolicy '{policy}': {pod.name} opens {opened}"


@cache
def _kuberay_validators(folder: Path) -> dict[str, jsonschema.Draft202012Validator]:
    """Kind → the schema of its stored version, closed: a key it does not list is an error."""
    validators = {}
    for path in sorted(folder.glob("*.yaml")):
        document = yaml.load(
            path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
        [version] = [v for v in document["spec"]["versions"] if v["storage"]]
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"]["metadata"] = {}  # the API server's own type
        kind = document["spec"]["names"]["kind"]
        validators[kind] = jsonschema.Draft202012Validator(_closed(schema))
    return validators


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
    return closed
