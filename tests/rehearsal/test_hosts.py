"""The pretend machines that the rehearsals use, and a cluster on two of them that takes a job.

Three hosts, the doctor and a pulled cable are shown by the acceptance test `rehearsal`. One file: there is one bridge.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import TINY, result, rows
from tests.rehearsal.cluster import TINY_GRADIENTS, running_cluster
from tests.rehearsal.hosts import OPERATOR, Host, left_overs, running_hosts, skip_unless_possible

pytestmark = pytest.mark.cluster

SSH = ("ssh", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=5", "-q")
LISTEN = """
import socket, sys
listener = socket.create_server(("", int(sys.argv[1])))
print("listening", flush=True)
while True:
    connection, _ = listener.accept()
    while connection.recv(1 << 20):
        pass
    connection.close()
"""
SEND = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3)
began = time.time()
for _ in range(int(sys.argv[3])):
    connection.sendall(bytes(1 << 20))
connection.shutdown(socket.SHUT_WR)
connection.recv(1)
print(time.time() - began)
"""
PORT = "7000"
SHORT = (
    "--data.phantom_studies=130", "--train.placement=spread", "--train.stage1_steps=3", "--train.stage2_steps=0",
    "--train.warmup_steps=1", "--train.log_every=1", "--run.name=run",
)  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Host]]:
    skip_unless_possible()
    with running_hosts(tmp_path_factory.mktemp("hosts"), 2) as running:
        yield running
    assert left_overs(running.values()) == []


def send(host: Host, to: Host, mebibytes: int) -> float | None:
    """Seconds of sending; None where nothing arrives."""
    done = host.run("python", "-c", SEND, to.address, PORT, str(mebibytes), check=False)
    return None if done.returncode else float(done.stdout)


def test_a_machine_has_a_name_a_home_and_a_login_by_key(hosts: dict[str, Host]) -> None:
    said = hosts[OPERATOR].run(
        *SSH, "h2", "hostname; hostname -i; ls -d ~/.ssh; python3 -c 'import os; print(os.getpid())'"
    )
    name, address, home, pid = said.stdout.split()
    assert (name, address, home) == ("h2", hosts["h2"].address, str(Path("~root").expanduser() / ".ssh"))
    assert int(pid) < 1000  # of few: the processes of other machines are not there
    assert hosts["h1"].run("ls", "/tmp/ray").stdout == ""


def test_a_cable_pulled_or_narrowed_and_a_port_refused(hosts: dict[str, Host]) -> None:
    first, second = hosts["h1"], hosts["h2"]
    with second.running("python", "-c", LISTEN, PORT):
        assert send(first, second, 1) is not None
        second.cut()
        assert send(first, second, 1) is None
        second.plug()
        first.refuse(second.address, int(PORT))
        assert send(first, second, 1) is None
        first.allow()
        before = first.bytes_sent()
        assert send(first, second, 20) is not None
        assert 20 * 2**20 < first.bytes_sent() - before < 23 * 2**20
        first.narrow("100mbit")
        seconds = send(first, second, 20)
        assert seconds is not None
        assert seconds > 16 * 2**20 * 8 / 100e6  # but for what the burst lets through


def test_a_machine_without_power_is_gone_and_starts_again(hosts: dict[str, Host]) -> None:
    second = hosts["h2"]
    with second.running("python", "-c", LISTEN, PORT):
        second.power_off()
        assert second.processes() == []
    second.boot()
    with second.running("python", "-c", LISTEN, PORT):
        assert send(hosts["h1"], second, 1) is not None


@pytest.mark.ray
def test_ray_up_a_submitted_job_on_both_hosts_and_nothing_left(tmp_path: Path) -> None:
    skip_unless_possible()
    with running_cluster(tmp_path, count=2) as cluster:
        before = cluster.hosts["h2"].bytes_sent()
        storage = tmp_path / "runs"
        done = cluster.submit("python", "jobs/pretrain.py", f"--config={TINY}", f"--run.storage={storage}", *SHORT)
        assert done.returncode == 0, done.stdout[-3000:]
        assert "succeeded" in done.stdout
        assert cluster.hosts["h2"].bytes_sent() - before > 3 * TINY_GRADIENTS / 2  # two ranks, one on each host
    assert [row["step"] for row in rows(storage / "run")] == [1, 2, 3]
    assert result(storage / "run")["status"] == "finished"
    assert left_overs(cluster.hosts.values()) == []
