"""cluster/kuberay/ compared with KubeRay's fields, Kubernetes' schemas, and what Ray's autoscaler reads."""

from copy import deepcopy
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.cluster.files import CLUSTER, KUBERAY, ray_of_image, requirement
from tests.cluster.kuberay_schema import SCHEMAS

KUBERNETES = "1.34"
FILES = (*KUBERAY, "network_policy", "network_policy_job")


def documents(name: str) -> list[dict[str, Any]]:
    """All resources of a file."""
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / f"{name}.yaml").read_text()))


def resources(name: str) -> dict[str, dict[str, Any]]:
    """All resources of a file with Ray nodes, by kind."""
    return {resource["kind"]: resource for resource in documents(name)}


def cluster_spec(name: str) -> dict[str, Any]:
    """The Ray cluster of a file."""
    made = resources(name)
    return made["RayCluster"]["spec"] if "RayCluster" in made else made["RayJob"]["spec"]["rayClusterSpec"]


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups of a cluster by name, including the head."""
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def check(resource: dict[str, Any]) -> None:
    """Raise on what Kubernetes or KubeRay would refuse or silently drop."""
    if resource["kind"] not in SCHEMAS:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
        return
    jsonschema.validate(resource, SCHEMAS[resource["kind"]])
    spec = resource["spec"] if resource["kind"] == "RayCluster" else resource["spec"]["rayClusterSpec"]
    for group in groups(spec).values():
        pods = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
        kubernetes_validate.validate(pods, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", FILES)
def test_kubernetes_and_kuberay_know_every_field(name: str) -> None:
    for resource in documents(name):
        check(resource)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "authOption"), {"mode": "token"}),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "workerGroupSpecs", 0, "maxReplica"), 4),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "toleration"), []),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limit"), {}),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "volumes", 0, "emptyDir", "medium"), 1),
    ],
)
def test_a_misspelt_field_or_value_is_found(path: tuple[str | int, ...], value: Any) -> None:
    resource = deepcopy(resources("raycluster")["RayCluster"])
    part: Any = resource
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(resource)


def test_the_jobs_cluster_equals_the_standalone_one_but_for_its_label() -> None:
    job = cluster_spec("rayjob")
    for group in groups(job).values():
        del group["template"]["metadata"]
    assert job == cluster_spec("raycluster")
    assert resources("rayjob")["ServiceAccount"] == resources("raycluster")["ServiceAccount"]


def test_tokens_are_required_and_usage_statistics_are_off() -> None:
    spec = cluster_spec("raycluster")
    assert spec["authOptions"] == {"mode": "token"}
    for group in groups(spec).values():
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
        assert "RAY_AUTH_TOKEN" not in str(container["env"])


def test_images_and_version_are_of_the_ray_that_is_required() -> None:
    spec, ray = cluster_spec("raycluster"), requirement("ray")
    images = {c["image"] for group in groups(spec).values() for c in group["template"]["spec"]["containers"]}
    assert {ray_of_image(image) for image in images} == {spec["rayVersion"]}
    assert spec["rayVersion"] in ray


def test_pods_have_no_rights_that_they_do_not_need() -> None:
    for name, group in groups(cluster_spec("raycluster")).items():
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert not pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"]
        assert pod["automountServiceAccountToken"] == (name == "head")
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert cluster_spec("raycluster")["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_shared_memory_is_mounted_and_fits_the_pods_memory() -> None:
    for group in groups(cluster_spec("raycluster")).values():
        pod = group["template"]["spec"]
        (volume,), (container,) = pod["volumes"], pod["containers"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        assert volume["emptyDir"]["medium"] == "Memory"
        limit = container["resources"]["limits"]["memory"]
        assert 0 < gibibytes(volume["emptyDir"]["sizeLimit"]) < gibibytes(limit) / 2
        assert container["resources"]["limits"] == container["resources"]["requests"]


def gibibytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi"))


def test_rays_autoscaler_reads_ranges_resources_and_labels() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    resource = deepcopy(resources("raycluster")["RayCluster"])
    resource["metadata"]["namespace"] = "films"
    config = _derive_autoscaling_config_from_ray_cr(resource)
    types = config["available_node_types"]
    assert config["idle_timeout_minutes"] == 10
    assert (types["headgroup"]["resources"]["CPU"], types["headgroup"]["resources"]["GPU"]) == (0, 0)
    workers = {name: kind for name, kind in types.items() if name != "headgroup"}
    assert {name: (kind["min_workers"], kind["max_workers"]) for name, kind in workers.items()} == {
        "gpu-spot": (0, 4), "gpu-on-demand": (0, 2), "cpu": (0, 6),
    }  # fmt: skip
    assert {name: kind["resources"].get("GPU", 0) for name, kind in workers.items()} == {
        "gpu-spot": 4, "gpu-on-demand": 4, "cpu": 0,
    }  # fmt: skip
    assert {name: kind["labels"] for name, kind in workers.items() if kind["labels"]} == {
        "cpu": {"cmcgns.io/role": "data"}
    }
    assert workers["gpu-spot"]["priority"] > workers["gpu-on-demand"].get("priority", 0)
