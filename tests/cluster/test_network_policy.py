"""Attacks on the pods of a Ray cluster, and from them, under cluster/kuberay/'s network policies; and what has to work."""

from typing import Any

import pytest
import yaml

from tests.cluster.files import CLUSTER
from tests.cluster.network import Pod, connects, peers

API_SERVER = "10.96.0.1"
RAY_PORTS = (6379, 8265, 8076, 10001, 10002)
FILES = ("network_policy", "network_policy_job")


def policies(name: str) -> list[dict[str, Any]]:
    """The policies of a file with the address of the Kubernetes API."""
    text = (CLUSTER / "kuberay" / f"{name}.yaml").read_text()
    return list(yaml.safe_load_all(text.replace("CHANGE/32", f"{API_SERVER}/32")))


def node(name: str, kind: str) -> Pod:
    """A pod of the file's cluster, with the labels that the operator and our file give it."""
    cluster = {"network_policy": "cmcgns", "network_policy_job": "cxr-1-x7k2p"}[name]
    labels = {
        "app.kubernetes.io/created-by": "kuberay-operator",
        "app.kubernetes.io/name": "kuberay",
        "ray.io/cluster": cluster,
        "ray.io/is-ray-node": "yes",
        "ray.io/node-type": kind,
    }
    return Pod(labels | ({"cmcgns.io/run": "cxr-1"} if name == "network_policy_job" else {}))


OPERATOR = Pod(
    {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"},
    namespace="default",
)
DNS = Pod({"k8s-app": "kube-dns"}, namespace="kube-system")
SUBMITTER = Pod({"ray.io/originated-from-crd": "RayJob", "ray.io/originated-from-cr-name": "cxr-1"})
STRANGERS = {
    "a pod without labels": Pod(),
    "a pod with the operator's name": Pod({"app.kubernetes.io/name": "kuberay-operator"}),
    "a pod with the operator's labels": Pod(OPERATOR.labels),
    "the operator's labels in another namespace": Pod(OPERATOR.labels, namespace="elsewhere"),
    "the cluster's labels in another namespace": Pod(node("network_policy", "worker").labels, namespace="elsewhere"),
    "the job's labels in another namespace": Pod(node("network_policy_job", "worker").labels, namespace="elsewhere"),
    "a second Ray cluster": Pod(
        {"ray.io/is-ray-node": "yes", "ray.io/cluster": "second", "ray.io/node-type": "worker"}
    ),
    "another job's submitter": Pod(SUBMITTER.labels | {"ray.io/originated-from-cr-name": "other"}),
    "a machine of this network": Pod(address="10.0.0.9"),
    "an address outside": Pod(address="198.51.100.7"),
}


@pytest.mark.parametrize("kind", ["head", "worker"])
@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("name", FILES)
def test_a_stranger_cannot_open_a_port_of_ray(name: str, stranger: str, kind: str) -> None:
    target = node(name, kind)
    assert [p for p in RAY_PORTS if connects(policies(name), STRANGERS[stranger], target, p)] == []


@pytest.mark.parametrize(
    ("target", "port"),
    [
        (Pod({"app": "database"}), 5432),
        (Pod({"app": "web"}), 443),
        (Pod({"k8s-app": "kube-dns"}), 53),
        (Pod({"ray.io/cluster": "second", "ray.io/is-ray-node": "yes"}), 6379),
        (Pod(address="169.254.169.254"), 80),
        (Pod(address="169.254.169.254"), 443),
        (Pod(address="fd00:ec2::254"), 443),
        (Pod(address="10.0.0.9"), 443),
        (Pod(address="192.168.1.4"), 22),
        (Pod(address="198.51.100.7"), 22),
        (Pod(address="198.51.100.7"), 25),
        (Pod(address="198.51.100.7"), 53),
    ],
    ids=lambda v: v.address or str(v.labels) if isinstance(v, Pod) else str(v),
)
@pytest.mark.parametrize("kind", ["head", "worker"])
@pytest.mark.parametrize("name", FILES)
def test_a_node_that_was_taken_over_cannot_reach_further(name: str, kind: str, target: Pod, port: int) -> None:
    assert not connects(policies(name), node(name, kind), target, port)


@pytest.mark.parametrize("name", FILES)
def test_a_worker_that_was_taken_over_cannot_reach_kubernetes(name: str) -> None:
    assert [p for p in (443, 6443) if connects(policies(name), node(name, "worker"), Pod(address=API_SERVER), p)] == []


@pytest.mark.parametrize("name", FILES)
def test_a_cluster_works_under_its_policies(name: str) -> None:
    given, head, worker = policies(name), node(name, "head"), node(name, "worker")
    for port in RAY_PORTS:
        assert connects(given, worker, head, port)
        assert connects(given, head, worker, port)
        assert connects(given, worker, worker, port)
    for pod in (head, worker):
        assert connects(given, pod, DNS, 53, "UDP")
        assert connects(given, pod, DNS, 53)
        assert connects(given, pod, Pod(address="52.216.0.1"), 443)
        assert connects(given, pod, Pod(address="2600:1fa0::1"), 443)
    assert connects(given, head, Pod(address=API_SERVER), 443)
    assert connects(given, OPERATOR, head, 8265)
    assert not connects(given, OPERATOR, head, 6379)


def test_the_submitter_reaches_its_jobs_dashboard_and_nothing_else() -> None:
    given = policies("network_policy_job")
    assert connects(given, SUBMITTER, node("network_policy_job", "head"), 8265)
    assert not connects(given, SUBMITTER, node("network_policy_job", "head"), 6379)
    assert not connects(given, SUBMITTER, node("network_policy_job", "worker"), 8265)
    assert not connects(policies("network_policy"), SUBMITTER, node("network_policy", "head"), 8265)


@pytest.mark.parametrize("name", FILES)
def test_no_peer_is_left_open(name: str) -> None:
    for peer in peers(policies(name)):
        assert "ipBlock" in peer or peer["podSelector"]["matchLabels"]
        assert peer.get("namespaceSelector", {"matchLabels": {"": ""}})["matchLabels"]


def test_both_files_say_the_same_but_for_the_names_and_the_submitter() -> None:
    cluster, job = (CLUSTER / "kuberay" / f"{name}.yaml" for name in FILES)
    cluster_text, job_text = (yaml.safe_dump_all(yaml.safe_load_all(file.read_text())) for file in (cluster, job))
    renamed = cluster_text.replace("ray.io/cluster: cmcgns", "cmcgns.io/run: cxr-1").replace(
        "name: cmcgns", "name: cxr-1"
    )
    extra = set(job_text.splitlines()) - set(renamed.splitlines())
    assert extra == {"          ray.io/originated-from-cr-name: cxr-1", "          ray.io/originated-from-crd: RayJob"}
    assert set(renamed.splitlines()) - set(job_text.splitlines()) == set()


def test_rayjobs_pods_bear_the_label_that_its_policy_knows() -> None:
    made = {r["kind"]: r for r in yaml.safe_load_all((CLUSTER / "kuberay" / "rayjob.yaml").read_text())}
    job = made["RayJob"]
    spec = job["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["template"]["metadata"]["labels"] == {"cmcgns.io/run": job["metadata"]["name"]}
    assert f"--run.name={job['metadata']['name']}" in job["spec"]["entrypoint"]
    assert SUBMITTER.labels["ray.io/originated-from-cr-name"] == job["metadata"]["name"]
