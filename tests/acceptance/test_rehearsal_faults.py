"""What is wrong with a cluster's token, address, port, versions or bucket: the doctor and the job each say so in one message.

On pretend machines, where Ray, its port and its packages belong to one host at a time.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import REPOSITORY, TINY
from tests.rehearsal.cluster import TOKEN, Cluster, running_cluster
from tests.rehearsal.hosts import GATEWAY, Host, in_repository, left_overs, skip_unless_possible
from tests.s3 import S3Server, running_server

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.s3]

BRIDGE_ADDRESS = GATEWAY.partition("/")[0]
LISTENER = """
import socket, sys, time
taken = socket.create_server(("", int(sys.argv[1])))
print("listening", flush=True)
time.sleep(600)
"""
REFUSED = "the cluster refuses this process's token, or it has none. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    skip_unless_possible(install=True)
    with running_cluster(tmp_path_factory.mktemp("cluster"), count=2) as running:
        yield running
    assert left_overs(running.hosts.values()) == []


@pytest.fixture(scope="module")
def s3(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server at the bridge, which every host reaches."""
    with running_server(tmp_path_factory.mktemp("s3"), address=BRIDGE_ADDRESS) as server:
        server.make_bucket("hospital")
        yield server


def doctor_and_job(host: Host, storage: Path | str, **environment: str) -> tuple[str, str]:
    """What each prints on ``host``, as a driver there; both have to fail."""
    here = TOKEN | environment
    visit = driver(host, here, "-m", "cmcgns.doctor", "--doctor.megabytes=4", f"--run.storage={storage}")
    job = driver(host, here, "jobs/pretrain.py", f"--config={TINY}", f"--run.storage={storage}")
    assert (visit[0], job[0]) == (1, 2), (visit, job)
    assert job[1].count("error: ") == 1, job
    for said in (visit[1], job[1]):
        assert "Traceback" not in said
    return visit[1], job[1]


def driver(host: Host, environment: dict[str, str], *words: str) -> tuple[int, str]:
    line = in_repository("python", *words)
    done = host.run(*line, check=False, timeout_s=300, environment=environment)
    return done.returncode, done.stdout


def at_head(cluster: Cluster, port: int = 6379) -> dict[str, str]:
    return {"RAY_ADDRESS": f"{cluster.head.address}:{port}"}


def test_a_wrong_token(cluster: Cluster, tmp_path: Path) -> None:
    for said in doctor_and_job(cluster.operator, tmp_path, **at_head(cluster), RAY_AUTH_TOKEN="0" * 64):
        assert said.count(REFUSED) == 1


def test_no_token(cluster: Cluster, tmp_path: Path) -> None:
    for said in doctor_and_job(cluster.operator, tmp_path, **at_head(cluster), HOME="/run"):
        assert said.count(REFUSED) == 1


def test_an_address_that_another_program_has(cluster: Cluster, tmp_path: Path) -> None:
    with cluster.head.running("python", "-c", LISTENER, "7001"):
        for said in doctor_and_job(cluster.operator, tmp_path, **at_head(cluster, 7001)):
            assert said.count("no Ray cluster answers at this address") == 1


def test_a_taken_port_is_named_before_ray_is_started_there(cluster: Cluster, tmp_path: Path) -> None:
    with cluster.operator.running("python", "-c", LISTENER, "6379"):
        status, said = driver(cluster.operator, TOKEN, "-m", "cmcgns.doctor", f"--run.storage={tmp_path}")
    assert status == 0
    assert "port 6379 is already in use" in said
    assert "For `ray start --head` on this machine set --port to another port" in said


def test_other_sources_on_one_host(cluster: Cluster, tmp_path: Path) -> None:
    other = cluster.folder / "other"
    cluster.head.run("cp", "-r", str(REPOSITORY / "cmcgns"), str(other))
    (other / "errors.py").write_text((other / "errors.py").read_text() + "\n# of yesterday\n")
    second = cluster.hosts["h2"]
    second.run("mount", "--bind", str(other), str(REPOSITORY / "cmcgns"))
    try:
        for said in doctor_and_job(cluster.head, tmp_path, RAY_ADDRESS="auto"):
            assert "h2" in said
            assert said.count("(driver ") == 1
            assert "cmcgns" in said
    finally:
        second.run("umount", "-l", str(REPOSITORY / "cmcgns"))


def test_a_bucket_that_one_host_does_not_reach(cluster: Cluster, s3: S3Server) -> None:
    second = cluster.hosts["h2"]
    environment = s3.environment | {"RAY_ADDRESS": "auto"}
    second.refuse(BRIDGE_ADDRESS, int(s3.endpoint.rpartition(":")[2]))
    try:
        visit, job = doctor_and_job(cluster.head, "s3://hospital/runs", **environment)
    finally:
        second.allow()
    assert [line.split()[:2] for line in visit.splitlines() if line.startswith("failed")] == [["failed", "run.storage"]]
    for said in (visit, job):
        (line,) = (line for line in said.splitlines() if "the endpoint does not answer" in line)
        assert "h2" in line
        assert line.count("s3://hospital/runs: ") == 1


def test_a_machine_that_is_no_node_of_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    for said in doctor_and_job(cluster.operator, tmp_path, **at_head(cluster)):
        assert said.count("this machine is not a node of that cluster") == 1
        assert "ray job submit" in said


def test_another_ray_on_one_host(cluster: Cluster, tmp_path: Path) -> None:
    import ray

    version = Path(ray.__file__).with_name("_version.py")
    other = cluster.folder / "_version.py"
    other.write_text(version.read_text().replace(ray.__version__, "2.59.0"))
    second = cluster.hosts["h2"]
    second.run("mount", "--bind", str(other), str(version))
    try:
        for said in doctor_and_job(second, tmp_path, **at_head(cluster)):
            assert said.count("Version mismatch") == 1
            assert "Run the job with the cluster's own Python and Ray" in said
        second.run("ray", "stop", environment=TOKEN)  # the head's autoscaler tries to start it again, in vain as we do
        cluster.wait_for_nodes(["h1"])
        start = second.run("ray", "start", f"--address={cluster.head.address}:6379", check=False, environment=TOKEN)
        assert start.returncode != 0
        assert "2.59.0" in start.stdout
        words = ["-m", "cmcgns.doctor", "--doctor.nodes=2", f"--run.storage={tmp_path}"]
        status, said = driver(cluster.head, TOKEN | {"RAY_ADDRESS": "auto"}, *words)
        assert status == 1
        assert "1 of 2: h1 2 CPU" in said
    finally:
        second.run("umount", "-l", str(version))
